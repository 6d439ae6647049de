"""Diff pruning: one gate per element, opened and closed by training."""
