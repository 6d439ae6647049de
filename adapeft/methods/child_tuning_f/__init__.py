"""ChildTuning-F: all candidates, with gradients that are masked at random in each step."""
