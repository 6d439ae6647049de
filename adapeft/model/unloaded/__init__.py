"""A base model that is not loaded: its structure, and running it on shapes or fake tensors."""
