"""Checks of a run before anything is measured: inputs, budget, memory."""
