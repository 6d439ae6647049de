"""``adapeft delta``: arithmetic of deltas, and conflicts between them."""
