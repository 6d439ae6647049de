"""``adapeft show``: describe a run, a subset or a delta."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

from adapeft.choose.options import choice_problem
from adapeft.config.load import load_config
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.files.artifact import artifact_kind
from adapeft.measure.statistics import Statistics
from adapeft.measure.storage import TABLE, load_groups, load_options
from adapeft.methods.registry import get_method
from adapeft.sections.paths import is_url
from adapeft.subset.locate import locate
from adapeft.subset.subset import Subset
from cluster.output.folder import RunFolder
from cluster.output.metrics import load_metrics
from cluster.output.mirror import fetched
from cluster.terminal.console import Terminal
from solver import choice_frontier, frontier

_SHARES = tuple(Fraction(1, n) for n in (10_000, 2_000, 1_000, 200, 100, 50, 20, 10))


def show(place: str, terminal: Terminal) -> None:
    """Print the summary of a run, or the description of a subset or delta.

    Raises:
        AdapeftError: ``place`` is none of these.
    """
    if Path(place).is_dir() or (is_url(place) and not place.endswith(".safetensors")):
        _show_run(RunFolder(fetched(place)), terminal)
        return
    path = locate(place)
    kind = artifact_kind(path)
    if kind == "subset":
        terminal.show_choice(Subset.load(path))
    elif kind == "delta":
        terminal.show_delta(Delta.load(path), path)
    else:
        raise AdapeftError(f"{path}: neither a run's folder, nor a subset, nor a delta.")


def _show_frontier(folder: RunFolder, subset: Subset, terminal: Terminal) -> None:
    """Show the influence under other budgets, if groups were measured and are not single elements."""
    if not (folder.path / TABLE).is_file():
        return
    groups, columns, key = load_groups(folder.path)
    if not columns or groups.granularity == "element":
        return
    said = subset.choice
    method, reach = get_method(said.needed("method")), float(said.needed("reach"))
    budget = said.needed("budget")
    statistics = Statistics(groups, columns, options=load_options(folder.path, groups))
    values = method.group_values(statistics, reach)
    assert values is not None
    available = int(groups.counts.sum())
    # Rounded down like a budget of the config, so that the run's own budget does not appear twice.
    counts = {budget, *(math.floor(share * groups.num_total) for share in _SHARES)}
    budgets = sorted(count for count in counts if groups.counts.min() <= count <= available)
    if statistics.options is None:
        curve = frontier(values, groups.counts, budgets)
    else:
        worth = method.option_values(statistics, reach)
        assert worth is not None
        options = key.get("select.options")
        with_rows = isinstance(options, list) and "row" in options
        problem = choice_problem(groups, values, statistics.options, worth, budget, with_rows=with_rows)
        curve = choice_frontier(problem, budgets)
    terminal.show_frontier(curve, groups.num_total, budget)


def _show_run(folder: RunFolder, terminal: Terminal) -> None:
    if not folder.config.is_file():
        raise AdapeftError(f"{folder.path}: not the folder of a run (no config.yaml).")
    if folder.subset.is_file():
        subset = Subset.load(folder.subset)
        terminal.show_choice(subset)
        _show_frontier(folder, subset, terminal)
    metrics = load_metrics(folder.metrics)
    if "after" in metrics:
        terminal.show_summary(load_config(folder.config), metrics, folder)
    else:
        terminal.note(f"{folder.path}: not trained yet")
