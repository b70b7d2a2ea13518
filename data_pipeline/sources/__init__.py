"""The data sets as their authors distribute them."""
