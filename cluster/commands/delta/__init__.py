"""``adapeft delta``: arithmetic of deltas and where they conflict."""
