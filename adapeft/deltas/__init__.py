"""Deltas: applying, adding and swapping them, and merging them into a checkpoint."""
