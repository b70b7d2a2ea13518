"""Checkpoints: complete or not there at all, and complete without the run that wrote them."""
