"""Validation of influence: short training of random subsets, and comparison of choices over a training run."""
