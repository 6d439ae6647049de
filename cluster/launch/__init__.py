"""Launching rank functions on workers."""
