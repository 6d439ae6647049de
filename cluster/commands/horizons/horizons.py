"""``adapeft horizons``: how much of a choice's influence lasts during training, from statistics along a probe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from adapeft.files.artifact import provenance, save_json, save_text
from adapeft.files.json_numbers import infinity_in_words, undefined_as_null
from adapeft.measure.exact.probe import probe_points
from adapeft.measure.storage import load_statistics
from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.methods.registry import Plan, ValuedMethod, get_method
from adapeft.selection.choose import check_budget
from adapeft.subset.subset import Subset
from adapeft.validate.horizons import across_horizons
from cluster.output.folder import RunFolder
from cluster.output.pictures.horizons import draw_captured
from cluster.output.pictures.page import figure, grid, page_of
from cluster.output.pictures.picture import save_pictures
from cluster.output.report import title_of
from cluster.terminal.console import Terminal, number_table, short


def horizons(source: Path, budget: str | None, terminal: Terminal) -> None:
    """Write ``horizons.json`` and ``horizons.html`` into the run's folder and show what the choices capture.

    Args:
        source: folder of a run.
        budget: budget of every choice; None: the run's own.
        terminal: terminal that shows the result.

    Raises:
        AdapeftError: ``source`` is no run that measured along a probe, or the budget is invalid for it.
    """
    folder = RunFolder(source)
    folder.check_has_statistics(str(source))
    config = load_config(folder.config, [] if budget is None else [f"select.budget={budget}"])
    select, method = config.select, get_method(config.select.method)
    if not (isinstance(select, AdaPEFTOptions) and select.probe_steps and isinstance(method, ValuedMethod)):
        raise AdapeftError(
            f"{source}: was measured at one point only. Run select into another output with select.probe_steps=N, the "
            f"number of training steps to compare with, and select.probe_points=P."
        )
    choice = Subset.load(folder.subset).choice
    if select.budget.is_auto:
        raise AdapeftError(
            f"select.budget = auto: the choices of all points are compared at one budget. Give a number: --budget "
            f"{choice.needed('budget')} is what this run took."
        )
    statistics, _ = load_statistics(source)
    plan = Plan(
        check_budget(statistics.groups, select),
        float(choice.needed("reach")),
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
    heads, rows = _cells(found)
    picture, page = draw_captured(found), source / "horizons.html"
    save_pictures(folder.pictures, [picture])
    save_text(page, page_of(f"Horizons: {title_of(config)}", [figure(picture), grid(heads, rows)]))
    _show(found, heads, rows, terminal)
    terminal.note(f"all figures: {short(path)}, picture: {short(page)}")


def _cells(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of a table of the influence that each choice captures at every point."""
    chosen = {f"at step {step}": row for step, row in zip(found["steps"], found["captured"], strict=True)}
    chosen |= {f"{name}ly": found[name]["captured"] for name in ("uniform", "random") if name in found}
    heads = ["influence captured: chosen", *(f"at step {step}" for step in found["steps"])]
    return heads, [
        [name, *("–" if share is None else f"{share:.1%}" for share in shares)] for name, shares in chosen.items()
    ]


def _show(found: Mapping[str, Any], heads: list[str], rows: list[list[str]], terminal: Terminal) -> None:
    table = number_table(*heads)
    for row in rows:
        table.add_row(*row)
    terminal.console.print(table)
    overlap, correlation = found["overlap"][0][-1], found["density_correlation"][0][-1]
    ranked = "undefined, as nothing is worth training at one of them" if correlation is None else f"{correlation:.2f}"
    ends = f"first and last choice overlap by {overlap:.1%}; rank correlation of their densities: {ranked}"
    terminal.pairs({"ends": ends})
