"""Estimates of the memory that measuring and training need, and budgets in bytes."""
