"""Tasks: token ids, losses, sampled labels and metrics."""
