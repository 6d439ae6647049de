"""The checkpoint of a base model: its files, the names of its tensors, and reading them one at a time."""
