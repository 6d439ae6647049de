"""The pages of a run, ``report.html`` and ``validation.html``, and their pictures as PNG files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapeft.config.config import Config
from adapeft.files.artifact import save_text
from adapeft.subset.choice import Choice, in_one_step
from adapeft.subset.subset import Subset
from adapeft.subset.verdict import Verdict
from cluster.output.folder import RunFolder
from cluster.output.frontier import frontier_of
from cluster.output.generations import load_generations
from cluster.output.measured import chosen_of, measured_of, one_by_one, predicted_decrease, unit_of
from cluster.output.metrics import load_metrics, memory_of
from cluster.output.pictures.curves import draw_loss, draw_metric, draw_prediction
from cluster.output.pictures.frontier import draw_frontier
from cluster.output.pictures.layers import draw_chosen, draw_influence
from cluster.output.pictures.memory import draw_memory
from cluster.output.pictures.page import answers, figure, grid, page_of, pairs
from cluster.output.pictures.picture import Picture, save_pictures
from cluster.output.pictures.slopes import draw_slopes
from cluster.output.pictures.validation import draw_correlations, draw_gains
from cluster.units import size_of

_ANSWERS = 5
"""Number of generated answers that are shown."""


def write_report(folder: RunFolder, config: Config) -> None:
    """Write the report of a trained run. What the run has no data for is left out.

    Args:
        folder: folder of the run.
        config: config of the run.
    """
    metrics, subset = load_metrics(folder.metrics), Subset.load(folder.subset)
    pictures = _pictures(folder, subset, metrics)
    save_pictures(folder.pictures, pictures)
    title = title_of(config)
    generations = load_generations(folder.generations)[:_ANSWERS]
    before = load_generations(folder.generations_before)
    blocks = [pairs(figures_of(config, metrics)), *map(figure, pictures), answers(generations, before)]
    save_text(folder.report, page_of(title, blocks))


def write_validation_report(folder: RunFolder, config: Config, result: Mapping[str, Any]) -> None:
    """Write the page of a validation, and its pictures next to those of the run.

    Args:
        folder: folder of the run.
        config: config of the run.
        result: content of ``validation.json``.
    """
    settings = result["settings"]
    drawn = [draw_gains(result), draw_correlations(settings)]
    pictures = [picture for picture in drawn if picture is not None]
    save_pictures(folder.pictures, pictures)
    titles = [f"learning rate {one['learning_rate']:g}, {one['steps']} steps" for one in settings]
    found = [{name: values.get("all") for name, values in one["correlations"].items()} for one in settings]
    cells = ([name, *("–" if one.get(name) is None else f"{one[name]:.2f}" for one in found)] for name in found[0])
    said = {
        title: f"τ = {one['planned_constant']:.3g} · Σ learning rates, fitted to the outcomes "
        f"{one['fitted_constant']:.3g}; {one['overshooting']:.0%} of the subsets raised the loss"
        for title, one in zip(titles, settings, strict=True)
    }
    blocks = [pairs(said), *map(figure, pictures), "<h2>Rank correlations</h2>", grid(["estimator", *titles], cells)]
    save_text(folder.validation_report, page_of(f"Validation: {title_of(config)}", blocks))


def title_of(config: Config) -> str:
    """Return the model and the data of a run in a few words."""
    return f"{Path(config.model.name).name} on {Path(config.data.train).name}"


def _pictures(folder: RunFolder, subset: Subset, metrics: Mapping[str, Any]) -> list[Picture]:
    unit, predicted = unit_of(subset.choice), predicted_decrease(subset.choice, metrics)
    front = frontier_of(folder, subset)
    drawn = [
        draw_loss(metrics, _training_losses(folder.events)),
        draw_metric(metrics),
        None if predicted is None else draw_prediction(metrics, predicted),
        front and draw_frontier(front, unit),
        draw_chosen(subset, chosen_of(folder, subset)),
        *_of_groups(folder, subset.choice),
        draw_memory(memory_of(metrics)),
    ]
    return [picture for picture in drawn if picture is not None]


def _of_groups(folder: RunFolder, choice: Choice) -> list[Picture | None]:
    """Return the pictures of influence and slopes, as far as the run has measured them."""
    found = measured_of(folder)
    if found is None:
        return []
    pictures = []
    if found.names is not None:
        pictures.append(
            draw_influence(found.names, found.influence, unit_of(choice), one_by_one(found.influence, choice))
        )
    if found.slopes is not None and found.slope_errors is not None:
        kind = "tensor" if choice.granularity == "element" else choice.granularity or "group"
        pictures.append(draw_slopes(found.slopes, found.slope_errors, np.nan_to_num(found.influence), kind))
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


def figures_of(config: Config, metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of a trained run as name → text."""
    before, after, choice = metrics["before"], metrics["after"], metrics["choice"]
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    rows = {name: f"{before[name]:.4f} → {after[name]:.4f}" for name in after if name in before}
    rows["trained"] = f"{trained:,} of {total:,} parameters ({trained / total:.3%})"
    if always := metrics["always_trained_parameters"]:
        rows["always trained"] = f"{always:,} parameters"
    rows["method"] = f"{choice.get('method') or 'not named'}, {choice.get('granularity') or 'not named'}"
    if choice.get("value") is not None:
        rows["influence"] = f"{choice['value']:.4g}{in_one_step(choice.get('joint_value'))}"
    if (verdict := metrics.get("verdict")) is not None:
        rows["verdict"] = Verdict(**verdict).text
    if "learning_rate" in metrics:
        found = f", found by {len(metrics['trials'])} trials" if "trials" in metrics else ""
        rows["learning rate"] = f"{metrics['learning_rate']:g}{found}"
    if "head_learning_rate" in metrics:
        rows["learning rate of the new head"] = f"{metrics['head_learning_rate']:.3g}"
    rows["delta"] = size_of(metrics["delta_bytes"])
    rows["peak memory"] = f"{size_of(metrics['peak_memory_bytes'])} per worker while training"
    rows["seconds"] = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in metrics["seconds"].items())
    rows["model"], rows["task"], rows["data"] = config.model.name, config.model.task, config.data.train
    return rows
