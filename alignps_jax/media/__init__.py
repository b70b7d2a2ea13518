"""Files into pixels: photos, videos, and the folders that hold them."""
