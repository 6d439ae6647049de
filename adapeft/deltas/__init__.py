"""Deltas: what training changed, applied, added, swapped and merged into a checkpoint."""
