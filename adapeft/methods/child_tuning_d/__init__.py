"""ChildTuning-D: the elements of largest squared batch gradients."""
