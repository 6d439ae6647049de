"""``adapeft compare``: methods side by side, at a learning rate that suits each."""
