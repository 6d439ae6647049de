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
        summary = entry.summary
        table.add_row(
            entry.name,
            _end_of(summary.base),
            _method(summary),
            _trained(summary),
            _end_of(summary.data),
            _score(summary),
            (summary.fingerprint or "–")[:12],
            f"{entry.added:%Y-%m-%d}",
        )
    terminal.console.print(table)


def show_entry(entry: Entry, terminal: Terminal) -> None:
    """Print the store's record of a subset."""
    summary = entry.summary
    made = summary.provenance
    versions = ", ".join(f"{package} {version}" for package, version in made.versions.items())
    terminal.pairs(
        {
            "base": f"{summary.base or 'not named'}, fingerprint {(summary.fingerprint or 'unknown')[:12]}",
            "method": _method(summary),
            "task": f"{summary.task or 'not named'} on {summary.data or 'unnamed data'}",
            "trained": _trained(summary) + (f", budget {summary.budget:,}" if summary.budget is not None else ""),
            "score": _score(summary),
            "made by": versions + (f", revision {made.revision}" if made.revision else ""),
            "added": f"{entry.added:%Y-%m-%d %H:%M} UTC, {size_of(entry.size)}, sha256 {entry.sha256}",
        }
    )


def _method(summary: Summary) -> str:
    return " by ".join(word for word in (summary.method, summary.granularity) if word) or "–"


def _trained(summary: Summary) -> str:
    return f"{summary.count:,}" + (f" ({summary.count / summary.num_total:.3%})" if summary.num_total else "")


def _score(summary: Summary) -> str:
    if summary.metric is None or summary.metric not in summary.after:
        return "–"
    before = f"{summary.before[summary.metric]:.4f} → " if summary.metric in summary.before else ""
    return f"{summary.metric} {before}{summary.after[summary.metric]:.4f}"


def _end_of(place: str | None) -> str:
    """Return the last two parts of an absolute path, which say more than its beginning; other names stay whole."""
    return "–" if place is None else "/".join(Path(place).parts[-2:]) if os.path.isabs(place) else place
