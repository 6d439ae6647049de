"""Child pruning: the largest differences are kept, every few steps."""
