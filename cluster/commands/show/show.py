"""``adapeft show``: describe a run, a subset or a delta."""

from __future__ import annotations

from pathlib import Path

from adapeft.config.load import load_config
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.files.artifact import artifact_kind
from adapeft.sections.paths import is_url
from adapeft.subset.locate import locate
from adapeft.subset.subset import Subset
from cluster.output.folder import RunFolder
from cluster.output.frontier import frontier_of
from cluster.output.metrics import load_metrics
from cluster.output.mirror import fetched
from cluster.terminal.console import Terminal


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


def _show_run(folder: RunFolder, terminal: Terminal) -> None:
    if not folder.config.is_file():
        raise AdapeftError(f"{folder.path}: not the folder of a run (no config.yaml).")
    if folder.subset.is_file():
        subset = Subset.load(folder.subset)
        terminal.show_choice(subset)
        front = frontier_of(folder, subset)
        if front is not None:
            terminal.show_frontier(front.curve, front.num_total, front.budget)
    metrics = load_metrics(folder.metrics)
    if "after" in metrics:
        terminal.show_summary(load_config(folder.config), metrics, folder)
    else:
        terminal.note(f"{folder.path}: not trained yet")
