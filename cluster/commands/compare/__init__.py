"""``adapeft compare``: compare methods, each at its own learning rate."""
