"""The rows and tables of the paper, run by name."""
