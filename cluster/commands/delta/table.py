"""Tables of the conflicts between deltas."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from rich.table import Table

from adapeft.deltas.conflict import Conflict, Overlap
from cluster.terminal.console import Terminal, number_table, without_block_index

_ROLES_SHOWN = 12


def show_conflicts(conflicts: Mapping[tuple[str, str], Conflict], terminal: Terminal) -> None:
    """Print one row per pair of deltas, and for a single pair its roles, those with the most conflict first."""
    if not conflicts:
        return
    names = list(dict.fromkeys(name for pair in conflicts for name in pair))
    labels = {name: f"#{number}" for number, name in enumerate(names, 1)}
    for name, label in labels.items():
        terminal.console.print(f"{label} {name}", soft_wrap=True)
    terminal.console.print(_pairs(conflicts, labels))
    for (first, second), conflict in conflicts.items():
        both = f"{labels[first]} and {labels[second]} both have"
        if conflict.adapters:
            terminal.note(f"{both} adapters after {', '.join(conflict.adapters)}, which are not compared")
        if conflict.heads:
            terminal.note(f"{both} {', '.join(conflict.heads)}, which are new and not compared")
    if len(conflicts) > 1:
        terminal.note("`adapeft delta diff` shows where two of them conflict")
        return
    (conflict,) = conflicts.values()
    if conflict.overlaps:
        terminal.console.print(_roles(conflict))
        terminal.note(
            "opposite: share of the entries changed by both with opposite signs; lost: their reduction of the whole "
            "cosine"
        )


def _pairs(conflicts: Mapping[tuple[str, str], Conflict], labels: Mapping[str, str]) -> Table:
    table = number_table("both change", "parameters", "entries", "opposite", "cosine", "whole cosine")
    for (first, second), conflict in conflicts.items():
        total = conflict.total
        table.add_row(
            f"{labels[first]} and {labels[second]}",
            f"{len(conflict.overlaps):,}",
            f"{total.both:,}",
            _share(total.opposite_share),
            _number(total.cosine),
            _number(conflict.cosine),
        )
    return table


def _roles(conflict: Conflict) -> Table:
    roles: defaultdict[str, Overlap] = defaultdict(Overlap)
    for name, overlap in conflict.overlaps.items():
        roles[without_block_index(name)] += overlap
    rows = sorted(roles.items(), key=lambda item: item[1].opposed, reverse=True)
    rest = rows[_ROLES_SHOWN:]
    if rest:
        together = sum((overlap for _, overlap in rest), Overlap())
        rows = [*rows[:_ROLES_SHOWN], (f"{len(rest)} other roles", together)]
    table = number_table("both change", "entries", "opposite", "cosine", "lost")
    for role, overlap in rows:
        table.add_row(
            role,
            f"{overlap.both:,}",
            _share(overlap.opposite_share),
            _number(overlap.cosine),
            _number(conflict.lost(overlap), digits=4),
        )
    return table


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def _number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.00
