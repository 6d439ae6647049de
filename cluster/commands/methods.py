"""``adapeft methods``: list the methods."""

from __future__ import annotations


def methods() -> None:
    """List the methods: what each trains, the cost of choosing, and its source."""
    from adapeft.methods.registry import METHODS
    from cluster.terminal.console import Terminal

    Terminal().show_methods(METHODS)
