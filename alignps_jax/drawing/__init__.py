"""How to paint boxes, rankings, points and heat maps."""
