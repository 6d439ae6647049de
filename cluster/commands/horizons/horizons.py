"""``adapeft horizons``: how much of a choice's influence lasts during training, from statistics along a probe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from adapeft.files.artifact import provenance, save_json
from adapeft.files.json_numbers import infinity_in_words, undefined_as_null
from adapeft.measure.exact.probe import probe_points
from adapeft.measure.storage import load_statistics
from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.methods.registry import Plan, ValuedMethod, get_method
from adapeft.selection.choose import check_budget
from adapeft.subset.subset import Subset
from adapeft.validate.horizons import across_horizons
from cluster.output.folder import RunFolder
from cluster.terminal.console import Terminal, number_table, short


def horizons(source: Path, budget: str | None, terminal: Terminal) -> None:
    """Write ``horizons.json`` into the run's folder and show the influence that the choices capture.

    Args:
        source: folder of a run.
        budget: budget of every choice; None: the run's own.
        terminal: terminal that shows the result.

    Raises:
        AdapeftError: ``source`` is no run that measured along a probe, or the budget is invalid for it.
    """
    folder = RunFolder(source)
    if not folder.config.is_file() or not folder.table.is_file():
        raise AdapeftError(f"{source}: no run with statistics (config.yaml, groups.parquet). Run select first.")
    config = load_config(folder.config, [] if budget is None else [f"select.budget={budget}"])
    select, method = config.select, get_method(config.select.method)
    if not (isinstance(select, AdaPEFTOptions) and select.probe_steps and isinstance(method, ValuedMethod)):
        raise AdapeftError(
            f"{source}: was measured at one point only. Run select into another output with select.probe_steps=N, the "
            f"number of training steps to compare with, and select.probe_points=P."
        )
    statistics, _ = load_statistics(source)
    plan = Plan(
        check_budget(statistics.groups, select),
        float(Subset.load(folder.subset).choice.needed("reach")),
        config.seed,
        select,
    )
    found = {
        "steps": probe_points(select),
        "budget": plan.budget,
        "reach": infinity_in_words(plan.reach),
        **across_horizons(statistics, method, plan),
    }
    path = source / "horizons.json"
    save_json(path, {**undefined_as_null(found), "provenance": provenance()})
    _show(found, terminal)
    terminal.note(f"all figures: {short(path)}")


def _show(found: Mapping[str, Any], terminal: Terminal) -> None:
    """Print the influence that each choice captures at every point, one row per choice."""
    table = number_table("influence captured: chosen", *(f"at step {step}" for step in found["steps"]))
    chosen = {f"at step {step}": row for step, row in zip(found["steps"], found["captured"], strict=True)}
    chosen |= {f"{name}ly": found[name]["captured"] for name in ("uniform", "random") if name in found}
    for name, shares in chosen.items():
        table.add_row(name, *("–" if share is None else f"{share:.1%}" for share in shares))
    terminal.console.print(table)
    overlap, correlation = found["overlap"][0][-1], found["density_correlation"][0][-1]
    ranked = "undefined, as nothing is worth training at one of them" if correlation is None else f"{correlation:.2f}"
    said = f"first and last choice overlap by {overlap:.1%}; rank correlation of their densities: {ranked}"
    terminal.pairs({"ends": said})
