"""Measurement and choice of a subset by a method within a budget, from a model and data."""
