"""Methods: one folder per method; ``options`` and ``registry`` list them, for the config and for what measures."""
