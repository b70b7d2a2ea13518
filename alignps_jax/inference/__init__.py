"""Boxes and embeddings of the people in a photo."""
