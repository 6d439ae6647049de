"""Pictures of a validation: predicted against measured gains, and how well every estimator ranks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.output.pictures.picture import Picture, add_legend, new_figure, png_of

_COLUMNS = 2


def draw_gains(result: Mapping[str, Any]) -> Picture | None:
    """Draw the measured gain of every random subset against its influence; None if the file holds no predictions.

    Args:
        result: content of ``validation.json``.
    """
    name = predictor(result.get("granularity", ""))
    settings = [one for one in result["settings"] if name in one.get("predictions", {})]
    if not settings:
        return None
    sizes = np.array([draw["size"] for draw in result["draws"]])
    rows = -(-len(settings) // _COLUMNS)
    figure = new_figure(0.5 + 2.5 * rows)
    panels = figure.subplots(rows, min(_COLUMNS, len(settings)), squeeze=False).flatten()
    raised = 0
    for index, (axes, setting) in enumerate(zip(panels, settings, strict=False)):
        raised += _draw_setting(axes, setting, np.array(setting["predictions"][name]), sizes)
        axes.set_xlabel("predicted gain", fontsize=8)
        if index % _COLUMNS == 0:
            axes.set_ylabel("measured gain", fontsize=8)
    for axes in panels[len(settings) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    add_legend(figure, 3, handles, labels)
    caption = (
        f"Gain of every random subset, the decrease of the held-out loss beyond that of training the head alone, "
        f"against its predicted gain ({name}), one panel per learning rate and number of steps. On the dashed line "
        f"both are equal. Crosses at the bottom: subsets that raised the loss, {raised} in all panels. Subsets without "
        f"a predicted gain are left out."
    )
    return Picture("gains", "Predicted and measured gains", caption, png_of(figure))


def predictor(granularity: str) -> str:
    """Return the name of the estimator by which groups of this granularity are chosen."""
    return "least joint influence (adam)" if granularity == "element" else "influence (adam)"


def _draw_setting(axes: Any, setting: Mapping[str, Any], predicted: np.ndarray, sizes: np.ndarray) -> int:
    """Draw the gains at one learning rate and horizon; return the number of subsets that raised the loss."""
    measured = np.array(setting["decreases"])  # -inf where training diverged
    shown = predicted > 0
    gained = shown & (measured > 0)
    if gained.any():
        both = np.concatenate([predicted[shown], measured[gained]])
        ends = [both.min(), both.max()]
        axes.plot(ends, ends, color="0.6", linestyle="--", linewidth=0.8)
        axes.set(xscale="log", yscale="log")
    for color, size in enumerate(np.unique(sizes)):
        of_size = gained & (sizes == size)
        label = f"{size:.4g} of the candidates" if size else "a single tensor"
        axes.plot(predicted[of_size], measured[of_size], "o", color=f"C{color}", markersize=3, label=label)
    lost = shown & ~gained
    floor = np.zeros(int(lost.sum()))
    axes.plot(
        predicted[lost], floor, "x", color="0.3", markersize=4, clip_on=False, transform=axes.get_xaxis_transform()
    )
    axes.set_title(f"learning rate {setting['learning_rate']:g}, {setting['steps']} steps", fontsize=8)
    axes.tick_params(labelsize=7)
    return int(lost.sum())


def draw_correlations(settings: Sequence[Mapping[str, Any]]) -> Picture:
    """Draw the rank correlation of every estimator with the measured gains, over all subsets.

    Args:
        settings: the settings of ``validation.json``.
    """
    found = [{name: values.get("all") for name, values in one["correlations"].items()} for one in settings]
    names = sorted(found[0], key=lambda name: float(np.mean([one.get(name) or 0.0 for one in found])))
    figure = new_figure(1.2 + 0.2 * len(names) + 0.2 * len(settings))
    axes = figure.subplots()
    for index, (setting, one) in enumerate(zip(settings, found, strict=True)):
        label = f"learning rate {setting['learning_rate']:g}, {setting['steps']} steps"
        values = [np.nan if (value := one.get(name)) is None else value for name in names]
        axes.plot(values, range(len(names)), "osD^v"[index % 5], color=f"C{index % 10}", markersize=4, label=label)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="rank correlation with the measured gains", ylim=(-0.6, len(names) - 0.4))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    add_legend(figure, 2)
    caption = (
        "Spearman's rank correlation of every estimator's predictions with the measured gains of all subsets; 1: it "
        "orders them as training does, 0: it knows nothing of them. Estimators without a marker predict the same for "
        "all."
    )
    return Picture("correlations", "Estimators", caption, png_of(figure))
