"""The report of a run: ``report.html``, and its pictures as PNG files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from adapeft.config.config import Config
from adapeft.files.artifact import load_table, save, save_text
from adapeft.measure.storage import TABLE, load_groups
from adapeft.methods.adapeft.method import AdaPEFT
from adapeft.subset.subset import Subset
from cluster.output.folder import RunFolder
from cluster.output.frontier import frontier_of
from cluster.output.generations import load_generations
from cluster.output.metrics import load_metrics
from cluster.output.pictures.curves import draw_loss, draw_metric
from cluster.output.pictures.estimated import Estimated
from cluster.output.pictures.frontier import draw_frontier
from cluster.output.pictures.layers import draw_chosen, draw_influence
from cluster.output.pictures.memory import draw_memory
from cluster.output.pictures.page import page_of
from cluster.output.pictures.picture import Picture
from cluster.output.pictures.slopes import draw_slopes
from cluster.units import size_of

_SHARES = (*(Fraction(n, 10**d) for d in range(5, 0, -1) for n in (1, 2, 5)), Fraction(1))
_PEAKS = {"measuring": "measuring_peak_memory_bytes", "training": "peak_memory_bytes"}
_ANSWERS = 5
"""Number of generated answers that are shown."""


def write_report(folder: RunFolder, config: Config, estimated: Mapping[str, Estimated]) -> None:
    """Write the report of a trained run. What the run has no data for is left out.

    Args:
        folder: folder of the run.
        config: config of the run.
        estimated: memory of each stage as estimated before the run; empty if it was not.
    """
    metrics, subset = load_metrics(folder.metrics), Subset.load(folder.subset)
    pictures = _pictures(folder, subset, metrics, estimated)
    for picture in pictures:
        save(folder.pictures / f"{picture.name}.png", _writer(picture))
    title = f"{Path(config.model.name).name} on {Path(config.data.train).name}"
    generations = load_generations(folder.generations)[:_ANSWERS]
    before = load_generations(folder.generations_before)
    save_text(folder.report, page_of(title, _figures(config, metrics), pictures, generations, before))


def _writer(picture: Picture) -> Any:
    return lambda temporary: temporary.write_bytes(picture.png)


def _pictures(
    folder: RunFolder, subset: Subset, metrics: Mapping[str, Any], estimated: Mapping[str, Estimated]
) -> list[Picture]:
    method = subset.choice.method
    unit = "predicted loss decrease" if method == AdaPEFT().name else f"value to the method {method}"
    front = frontier_of(folder, subset, _SHARES)
    peaks = {stage: metrics[key] for stage, key in _PEAKS.items() if key in metrics}
    drawn = [
        draw_loss(metrics, _training_losses(folder.events)),
        draw_metric(metrics),
        front and draw_frontier(front, unit),
        draw_chosen(subset),
        *_of_groups(folder, unit),
        draw_memory(estimated, peaks),
    ]
    return [picture for picture in drawn if picture is not None]


def _of_groups(folder: RunFolder, unit: str) -> list[Picture | None]:
    """Return the pictures of influence and slopes, as far as the run has measured them."""
    path = folder.path / TABLE
    if not path.is_file():
        return []
    table = load_table(path)
    if "influence" not in table.column_names:
        return []
    _, columns, _ = load_groups(folder.path)
    influence = table["influence"].to_numpy()
    pictures = []
    # A group of several tensors has no layer.
    if table["parameter"].null_count == 0:
        pictures.append(draw_influence(table["parameter"].to_pylist(), influence, unit))
    if {"slope", "slope_error"} <= columns.keys() and columns["slope"].ndim == 1:
        pictures.append(draw_slopes(columns["slope"], columns["slope_error"], np.nan_to_num(influence)))
    return pictures


def _training_losses(path: Path) -> dict[int, float]:
    """Return step → loss as the run has logged it. A step that was repeated after a failure counts once, the last."""
    losses = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:  # the last line before the process was killed
            continue
        if event.get("message") == "training" and isinstance(event.get("loss"), float):
            losses[event["done"]] = event["loss"]
    return dict(sorted(losses.items()))


def _figures(config: Config, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return name → value of the table."""
    before, after, choice = metrics["before"], metrics["after"], metrics["choice"]
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    rows = {name: f"{before[name]:.4f} → {after[name]:.4f}" for name in after if name in before}
    rows["trained"] = f"{trained:,} of {total:,} parameters ({trained / total:.3%})"
    if always := metrics["always_trained_parameters"]:
        rows["always trained"] = f"{always:,} parameters"
    rows["method"] = f"{choice.get('method') or 'not named'}, {choice.get('granularity') or 'not named'}"
    if choice.get("value") is not None:
        rows["influence"] = f"{choice['value']:.4g}"
    rows["delta"] = size_of(metrics["delta_bytes"])
    rows["peak memory"] = f"{size_of(metrics['peak_memory_bytes'])} per worker while training"
    rows["seconds"] = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in metrics["seconds"].items())
    rows["model"], rows["task"], rows["data"] = config.model.name, config.model.task, config.data.train
    return rows
