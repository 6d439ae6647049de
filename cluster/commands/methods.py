"""``adapeft methods``: the table of methods."""

from __future__ import annotations


def methods() -> None:
    """List the methods: what each trains, what choosing costs, where it comes from."""
    from adapeft.methods.registry import METHODS
    from cluster.terminal.console import Terminal

    Terminal().show_methods(METHODS)
