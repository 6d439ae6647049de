"""``adapeft show``: describe a run's folder, a subset or a delta."""
