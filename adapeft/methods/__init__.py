"""Methods: one folder per method; ``options`` and ``registry`` list them."""
