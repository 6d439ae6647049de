"""MagPruning: the largest weights."""
