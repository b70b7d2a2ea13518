"""The losses of the paper, pure: no collectives, no network."""
