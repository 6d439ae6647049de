"""``adapeft show``: what a run's folder, a subset or a delta holds."""
