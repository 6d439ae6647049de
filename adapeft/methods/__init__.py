"""Methods: one file per method, or a folder where it has a rule; ``registry`` has all."""
