"""Published PyTorch weights, in and out."""
