"""``adapeft show``: what an artifact says of itself."""

from __future__ import annotations

import json
from pathlib import Path

from adapeft.choose.subset import Subset
from adapeft.config_file import load_config
from adapeft.errors import AdapeftError
from adapeft.ship.delta import Delta
from cluster.console import Terminal
from cluster.run_folder import RunFolder


def show(path: Path, terminal: Terminal) -> None:
    """Prints a run's summary, or the description of a subset or delta.

    Raises:
        AdapeftError: neither.
    """
    if path.is_dir():
        _show_run(RunFolder(path), terminal)
        return
    try:
        terminal.show_choice(Subset.load(path))
    except AdapeftError as no_subset:
        try:
            terminal.show_delta(Delta.load(path), path)
        except AdapeftError:
            raise AdapeftError(f"{path}: neither a run's folder, nor a subset, nor a delta.") from no_subset


def _show_run(folder: RunFolder, terminal: Terminal) -> None:
    if not folder.config.is_file():
        raise AdapeftError(f"{folder.path}: no run (there is no config.yaml).")
    if folder.subset.is_file():
        terminal.show_choice(Subset.load(folder.subset))
    metrics = json.loads(folder.metrics.read_text()) if folder.metrics.is_file() else {}
    if "after" in metrics:
        terminal.show_summary(load_config(folder.config), metrics, folder)
    else:
        terminal.note(f"{folder.path}: not trained yet")
