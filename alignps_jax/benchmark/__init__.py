"""How fast every part is: absolutely, against its floor, and against PyTorch; see `run.py`."""
