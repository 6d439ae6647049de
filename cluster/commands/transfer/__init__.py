"""``adapeft transfer``: choose a subset for another model from a run's statistics."""
