"""Memory by part: the estimate against the measured peak."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.output.metrics import StageMemory, estimated_of
from cluster.output.pictures.picture import Picture, add_legend, new_figure, png_of

_MIB = 2**20


def draw_memory(stages: Mapping[str, StageMemory]) -> Picture | None:
    """Draw the estimate of each stage by part next to its measured peak; None if none was estimated.

    Args:
        stages: memory of each stage.
    """
    estimated, parts = estimated_of(stages)
    if not estimated:
        return None
    figure = new_figure(1.6 + 0.9 * len(estimated))
    axes = figure.subplots()
    labels = []
    for index, (stage, held) in enumerate(estimated.items()):
        row, left = 2.4 * index, 0.0
        for color, part in enumerate(parts):
            width = held.parts[part] / _MIB
            axes.barh(row, width, left=left, color=f"C{color}", label=None if index else part)
            left += width
        axes.barh(row + 0.9, held.peak / _MIB, color="0.2", label=None if index else "measured peak")
        labels += [f"{stage}, {'at most' if held.is_bound else 'estimated'}", f"{stage}, measured"]
    axes.set_yticks(
        [2.4 * index + shift for index in range(len(estimated)) for shift in (0.0, 0.9)], labels, fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("MiB on one device")
    add_legend(figure, 3)
    caption = "Memory of one worker in MiB: the estimate before the run by part, and the largest peak of a worker."
    if any(held.is_bound for held in estimated.values()):
        caption += " “At most”: activations depend on the weights, so only a bound is known before."
    return Picture("memory", "Memory", caption, png_of(figure))
