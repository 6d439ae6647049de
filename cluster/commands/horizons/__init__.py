"""``adapeft horizons``: test how long a choice stays good during training."""
