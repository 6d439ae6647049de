"""Mixout: training with weights that are randomly replaced by the pretrained ones."""
