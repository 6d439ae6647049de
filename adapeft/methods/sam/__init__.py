"""SAM: the largest squared gradients."""
