"""Examples: their sources, checks of their columns and labels, and batches."""
