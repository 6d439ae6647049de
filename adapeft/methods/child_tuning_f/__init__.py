"""ChildTuning-F: everything, with a random draw of the gradients in each step."""
