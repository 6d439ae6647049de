"""``adapeft transfer``: a subset for another model from a run's statistics."""
