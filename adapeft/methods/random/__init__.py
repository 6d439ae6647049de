"""Random: the baseline no selector may skip."""
