"""The pictures of `--mode=visualize`."""
