"""Diff pruning: gates of each element, opened and closed by training."""
