"""Search among the people of one's own photos."""
