"""Choosing for another size of the model, and how good such a choice is."""
