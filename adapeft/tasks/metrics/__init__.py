"""Metrics of an evaluation, and which of two scores is better."""
