"""Base classes of methods, of their options and of their rules."""
