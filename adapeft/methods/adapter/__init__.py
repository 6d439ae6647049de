"""Adapter: bottlenecks after the sublayers of the blocks."""
