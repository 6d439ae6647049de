"""Adapter: bottlenecks behind the sublayers of the blocks."""
