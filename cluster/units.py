"""Formatting of numbers with units."""

from __future__ import annotations


def size_of(num_bytes: float) -> str:
    """Format a number of bytes with a binary unit, from B to GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def percent_of(share: float) -> str:
    """Return a share of the model's parameters in percent, with three digits after the point."""
    return "<0.001%" if 0 < share < 5e-6 else f"{share:.3%}"
