"""Measuring with gradients of every parameter, or with losses alone."""
