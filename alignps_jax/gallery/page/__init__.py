"""A page in the browser that searches a gallery."""
