"""``adapeft show``: describe a run, a subset or a delta."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapeft.config.load import load_config
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.files.artifact import artifact_kind
from adapeft.sections.paths import is_url
from adapeft.subset.choice import Choice
from adapeft.subset.locate import locate
from adapeft.subset.subset import Subset
from cluster.commands.show.tables import show_evaluations, show_map, show_memory, show_slopes
from cluster.output.folder import RunFolder
from cluster.output.frontier import frontier_of
from cluster.output.generations import load_generations
from cluster.output.measured import chosen_of, measured_of, one_by_one, predicted_decrease
from cluster.output.metrics import load_metrics, memory_of
from cluster.output.mirror import fetched
from cluster.output.pictures.map import shares_of
from cluster.terminal.console import Terminal
from cluster.terminal.generations import show_generations
from cluster.units import size_of

_TRAINED = "trained parameters"


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
        subset = Subset.load(path)
        terminal.show_choice(subset)
        show_map(terminal, _TRAINED, _counts(subset))
    elif kind == "delta":
        terminal.show_delta(Delta.load(path), path)
    else:
        raise AdapeftError(f"{path}: neither a run's folder, nor a subset, nor a delta.")


def _show_run(folder: RunFolder, terminal: Terminal) -> None:
    if not folder.config.is_file():
        raise AdapeftError(f"{folder.path}: not the folder of a run (no config.yaml).")
    metrics = load_metrics(folder.metrics)
    if folder.subset.is_file():
        _show_choice(folder, Subset.load(folder.subset), metrics, terminal)
    if "after" in metrics:
        show_evaluations(terminal, metrics)
        show_generations(terminal, load_generations(folder.generations), load_generations(folder.generations_before))
        terminal.show_summary(load_config(folder.config), metrics, folder)
    else:
        terminal.note(f"{folder.path}: not trained yet")


def _show_choice(folder: RunFolder, subset: Subset, metrics: Mapping[str, Any], terminal: Terminal) -> None:
    terminal.show_choice(subset)
    chosen = chosen_of(folder, subset)
    is_without_draw = subset.choice.num_drawn and chosen is not None
    show_map(terminal, "chosen parameters" if is_without_draw else _TRAINED, _counts(chosen or subset))
    measured = measured_of(folder)
    if measured is not None:
        if measured.names is not None:
            _show_influence(terminal, measured.names, np.nan_to_num(measured.influence), subset.choice)
        show_slopes(terminal, measured)
    front = frontier_of(folder, subset)
    if front is not None:
        terminal.show_frontier(front)
    if "after" not in metrics:
        return
    predicted = predicted_decrease(subset.choice, metrics)
    said = {}
    if predicted is not None:
        decrease = metrics["before"]["loss"] - metrics["last"]["loss"]
        said["decrease"] = f"of the evaluation loss: {predicted.text}, {decrease:.4g} measured at the end"
    stages = memory_of(metrics)
    used = [f"{stage} {size_of(held.peak)}" for stage, held in stages.items()]
    terminal.pairs({**said, "peak": f"{', '.join(used)} of memory per worker"})
    show_memory(terminal, stages)


def _show_influence(terminal: Terminal, names: list[str], influence: np.ndarray, choice: Choice) -> None:
    reason = one_by_one(influence, choice)
    if reason is None:
        show_map(terminal, "influence", zip(names, influence.tolist(), strict=True))
        return
    show_map(terminal, "influence", zip(names, shares_of(influence).tolist(), strict=True), "{:.1%}")
    terminal.note(reason)


def _counts(subset: Subset) -> list[tuple[str, float]]:
    return [(name, float(part.count)) for name, part in subset.parts.items()]
