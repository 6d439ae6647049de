"""Tables of stored subsets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from adapeft.subset.entry import Entry, Summary
from cluster.terminal.console import Terminal, plain_table
from cluster.units import size_of


def show_entries(entries: Sequence[Entry], terminal: Terminal) -> None:
    """Print a table with one row per stored subset."""
    table = plain_table()
    for title in ("name", "base", "method", "trained", "data", "score", "fingerprint", "added"):
        table.add_column(title, justify="right" if title == "trained" else "left", no_wrap=title == "name")
    for entry in entries:
        said = entry.summary
        table.add_row(
            entry.name,
            _end_of(said.base),
            _method(said),
            _trained(said),
            _end_of(said.data),
            _score(said),
            (said.fingerprint or "–")[:12],
            f"{entry.added:%Y-%m-%d}",
        )
    terminal.console.print(table)


def show_entry(entry: Entry, terminal: Terminal) -> None:
    """Print the store's record of a subset."""
    said = entry.summary
    made = said.provenance
    versions = ", ".join(f"{package} {version}" for package, version in made.versions.items())
    terminal.pairs(
        {
            "base": f"{said.base or 'not named'}, fingerprint {(said.fingerprint or 'unknown')[:12]}",
            "method": _method(said),
            "task": f"{said.task or 'not named'} on {said.data or 'unnamed data'}",
            "trained": _trained(said) + (f", budget {said.budget:,}" if said.budget is not None else ""),
            "score": _score(said),
            "made by": versions + (f", revision {made.revision}" if made.revision else ""),
            "added": f"{entry.added:%Y-%m-%d %H:%M} UTC, {size_of(entry.size)}, sha256 {entry.sha256}",
        }
    )


def _method(said: Summary) -> str:
    return " by ".join(word for word in (said.method, said.granularity) if word) or "–"


def _trained(said: Summary) -> str:
    return f"{said.count:,}" + (f" ({said.count / said.num_total:.3%})" if said.num_total else "")


def _score(said: Summary) -> str:
    if said.metric is None or said.metric not in said.after:
        return "–"
    before = f"{said.before[said.metric]:.4f} → " if said.metric in said.before else ""
    return f"{said.metric} {before}{said.after[said.metric]:.4f}"


def _end_of(place: str | None) -> str:
    """Return the last two parts of an absolute path, which say more than its beginning; other names stay whole."""
    return "–" if place is None else "/".join(Path(place).parts[-2:]) if os.path.isabs(place) else place
