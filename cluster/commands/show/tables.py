"""The figures of a run's report as tables in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.bar import Bar

from cluster.output.measured import MeasuredGroups
from cluster.output.metrics import StageMemory, estimated_of
from cluster.output.pictures.map import OUTSIDE, map_of
from cluster.terminal.console import Terminal, number_table, plain_table
from cluster.units import size_of

_SHADES = "·░▒▓█"
_MOST_ROLES = 12
_MOST_EVALUATIONS = 12
_MOST_GROUPS = 8
_BAR = 24
"""Characters of the longest bar."""


def show_map(terminal: Terminal, title: str, values: Iterable[tuple[str, float]], number: str = "{:,.4g}") -> None:
    """Print the sums of values by role and layer, the darker the larger; nothing if none is positive.

    Args:
        terminal: terminal.
        title: what the values are.
        values: name of a parameter and its value.
        number: format of the sums.
    """
    found = map_of(values, _MOST_ROLES)
    if found is None:
        return
    inside = [str(layer) for layer in found.layers if layer != OUTSIDE]
    outside = ["outside"] if OUTSIDE in found.layers else []
    table = plain_table()
    table.add_column(f"{title} by role", no_wrap=True, max_width=40)
    layers = [f"layers {inside[0]}–{inside[-1]}" if len(inside) > 1 else f"layer {inside[0]}"] if inside else []
    table.add_column(", ".join([*outside, *layers]), overflow="fold")
    table.add_column("sum", justify="right")
    largest = float(np.nanmax(found.grid))
    for role, row in zip(found.roles, found.grid, strict=True):
        table.add_row(role, "".join(_shade(value / largest) for value in row), number.format(np.nansum(row)))
    if found.num_left_out:
        table.add_row(f"{found.num_left_out} other roles", "", "")
    terminal.console.print(table)


def _shade(share: float) -> str:
    return " " if math.isnan(share) else _SHADES[min(int(share * len(_SHADES)), len(_SHADES) - 1)]


def show_slopes(terminal: Terminal, groups: MeasuredGroups) -> None:
    """Print the slopes of the groups with the most influence; nothing if none were measured."""
    influence = np.nan_to_num(groups.influence)
    if groups.names is None or groups.slopes is None or groups.slope_errors is None:
        return
    # The slopes of single elements are sums over their tensors.
    has_rows = bool((groups.indices >= 0).any())
    table = number_table("most influence", *(["row"] if has_rows else []), "slope", "± error", "influence")
    for index in np.argsort(-influence, kind="stable")[:_MOST_GROUPS]:
        if influence[index] > 0:
            row = ["all" if groups.indices[index] < 0 else str(groups.indices[index])] if has_rows else []
            numbers = (groups.slopes[index], groups.slope_errors[index], influence[index])
            table.add_row(groups.names[index], *row, *("–" if math.isnan(n) else f"{n:.3g}" for n in numbers))
    if table.row_count:
        terminal.console.print(table)


def show_evaluations(terminal: Terminal, metrics: Mapping[str, Any]) -> None:
    """Print loss and metric of the base model and of some evaluations, the first, the last and the kept one included.

    Args:
        terminal: terminal.
        metrics: content of ``metrics.json`` of a trained run.
    """
    points = [{"step": 0, **metrics["before"]}, *metrics["history"]]
    shown = {round(place) for place in np.linspace(0, len(points) - 1, min(len(points), _MOST_EVALUATIONS))}
    metric, kept = metrics["metric"], metrics.get("best_step")
    most = max((point["loss"] for point in points if math.isfinite(point["loss"])), default=0.0)
    table = plain_table()
    table.add_column("step", justify="right")
    table.add_column("loss", justify="right")
    table.add_column("")
    if metric != "loss":
        table.add_column(metric, justify="right")
    table.add_column("")
    for index, point in enumerate(points):
        if index in shown or point["step"] == kept:
            loss = point["loss"]
            bar = Bar(most, 0, loss, width=_BAR) if most > 0 and math.isfinite(loss) else ""
            scores = [] if metric == "loss" else [f"{point[metric]:.4f}"]
            table.add_row(f"{point['step']:,}", f"{loss:.4f}", bar, *scores, "kept" if point["step"] == kept else "")
    terminal.console.print(table)


def show_memory(terminal: Terminal, stages: Mapping[str, StageMemory]) -> None:
    """Print the estimate of each stage by part next to its measured peak; nothing if none was estimated."""
    estimated, parts = estimated_of(stages)
    if not estimated:
        return
    table = number_table("estimated memory per worker", *estimated)
    for part in parts:
        table.add_row(part, *(size_of(held.parts[part]) for held in estimated.values()))
    totals = (("≤ " if held.is_bound else "") + size_of(sum(held.parts.values())) for held in estimated.values())
    table.add_row("total", *totals, style="bold")
    table.add_row("measured peak", *(size_of(held.peak) for held in estimated.values()))
    terminal.console.print(table)
