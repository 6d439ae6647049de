"""``adapeft horizons``: how long a choice stays good."""
