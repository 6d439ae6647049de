"""How long a choice stays good: the influence that choices at several points of a training capture at others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cluster.output.pictures.picture import Picture, add_legend, new_figure, png_of

_BASELINES = {"uniform": ("0.3", "--"), "random": ("0.6", ":")}


def draw_captured(found: Mapping[str, Any]) -> Picture:
    """Draw the share of the best choice's influence that each choice captures, by the point where it is measured.

    Args:
        found: content of ``horizons.json``.
    """
    steps = found["steps"]
    figure = new_figure(3.6)
    axes = figure.subplots()
    for index, (step, row) in enumerate(zip(steps, found["captured"], strict=True)):
        axes.plot(steps, _shares(row), color=f"C{index % 10}", marker="o", markersize=4, label=f"chosen at step {step}")
    for name, (color, dashes) in _BASELINES.items():
        if name in found:
            axes.plot(steps, _shares(found[name]["captured"]), dashes, color=color, label=name)
    axes.set(xlabel="step of the training", ylabel="influence captured", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    add_legend(figure, 2)
    caption = (
        "Influence of the choice made at each point of a training, measured at every point, as a share of that of the "
        "best choice there. Dashed: the same share of every tensor, its best groups at the first point; dotted: a "
        "random draw. Points at which nothing is worth choosing are left out."
    )
    return Picture("horizons", "How long a choice stays good", caption, png_of(figure))


def _shares(row: list[float | None]) -> list[float]:
    return [np.nan if share is None else share for share in row]
