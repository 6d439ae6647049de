"""Random: the baseline for every method."""
