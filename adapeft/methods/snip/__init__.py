"""SNIP: the largest connection sensitivities."""
