"""How training and inference scale (`--mode=scaling`): compiled for chips, or measured on them."""
