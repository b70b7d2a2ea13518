"""Checkpoints: complete or not there at all, and readable without the run that wrote them."""
