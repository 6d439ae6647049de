"""Mixout: training with weights that are at random the pretrained ones."""
