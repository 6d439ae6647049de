"""The table of features that a person sees."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from cluster.commands.doctor.features import Feature
from cluster.terminal.console import plain_table


def feature_table(features: Sequence[Feature]) -> Table:
    """One row per feature: ready, or what is missing; red where `adapeft run` needs it."""
    table = plain_table()
    for title in ("", "feature", "missing"):
        table.add_column(title, overflow="fold")
    for feature in features:
        style = "green" if feature.problem is None else "red" if feature.is_required else "yellow"
        mark = "ready" if feature.problem is None else "missing"
        table.add_row(Text(mark, style), Text(feature.name), Text(feature.problem or ""))
    return table
