"""Losses: the objectives, computing them in pieces, and the micro-batches of a global batch."""
