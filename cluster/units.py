"""Numbers in the units that people read them in."""

from __future__ import annotations


def size_of(num_bytes: float) -> str:
    """Bytes in the unit that a person would say them in."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
