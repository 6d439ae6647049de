"""Memory by part: the estimate against the measured peak."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.output.pictures.estimated import Estimated
from cluster.output.pictures.picture import Picture, add_legend, new_figure, png_of

_MIB = 2**20


def draw_memory(estimated: Mapping[str, Estimated], peaks: Mapping[str, int]) -> Picture | None:
    """Draw the estimate of each stage by part next to its measured peak; None if there is no estimate or no peak.

    Args:
        estimated: estimate of each stage.
        peaks: largest measured memory of a worker, in bytes, of each stage.
    """
    stages = [stage for stage in estimated if stage in peaks]
    if not stages:
        return None
    parts = [part for part in estimated[stages[0]].parts if any(estimated[stage].parts[part] for stage in stages)]
    figure = new_figure(1.6 + 0.9 * len(stages))
    axes = figure.subplots()
    labels = []
    for index, stage in enumerate(stages):
        row, left = 2.4 * index, 0.0
        for color, part in enumerate(parts):
            width = estimated[stage].parts[part] / _MIB
            axes.barh(row, width, left=left, color=f"C{color}", label=None if index else part)
            left += width
        axes.barh(row + 0.9, peaks[stage] / _MIB, color="0.2", label=None if index else "measured peak")
        labels += [f"{stage}, {'at most' if estimated[stage].is_bound else 'estimated'}", f"{stage}, measured"]
    axes.set_yticks([2.4 * index + shift for index in range(len(stages)) for shift in (0.0, 0.9)], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("MiB on one device")
    add_legend(figure, 3)
    caption = "Memory of one worker in MiB: the estimate before the run by part, and the largest peak of a worker."
    if any(estimated[stage].is_bound for stage in stages):
        caption += " “At most”: activations depend on the weights, so only a bound is known before."
    return Picture("memory", "Memory", caption, png_of(figure))
