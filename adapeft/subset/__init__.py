"""Subsets: what is trained of each parameter, and the store of named ones."""
