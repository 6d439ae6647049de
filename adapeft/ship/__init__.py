"""What leaves a run: the delta, the merged checkpoint."""
