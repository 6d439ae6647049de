"""Slopes of the most influential groups, with their standard errors."""

from __future__ import annotations

import numpy as np

from cluster.output.pictures.picture import Picture, new_figure, png_of

_SHOWN = 40


def draw_slopes(slopes: np.ndarray, errors: np.ndarray, influence: np.ndarray, kind: str) -> Picture | None:
    """Draw the slopes of the groups with the most influence; None if no group has any.

    Args:
        slopes: slope of each group. [K].
        errors: standard error of each slope; NaN where it is unknown. [K].
        influence: influence of each group. [K].
        kind: kind of the groups, such as ``row``.
    """
    best = np.argsort(-influence, kind="stable")[:_SHOWN]
    best = best[influence[best] > 0]
    if not len(best):
        return None
    figure = new_figure(3.2)
    axes = figure.subplots()
    known = np.nan_to_num(errors[best])
    ranks = np.arange(1, len(best) + 1)
    axes.errorbar(ranks, slopes[best], yerr=known, fmt="o", markersize=3, capsize=2, color="C0", ecolor="0.5")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel=f"{kind}, by influence", ylabel="slope of the loss")
    unknown = int(np.isnan(errors[best]).sum())
    caption = (
        f"Slope of the loss along each {kind}'s direction, for the {len(best)} {kind}s with the most influence of "
        f"{len(slopes):,}, with one standard error over the calibration batches. A slope within its "
        "error of 0 may be noise."
    )
    if unknown:
        caption += f" The error of {unknown} is unknown, because a single batch was measured."
    return Picture("slopes", "Slopes and their errors", caption, png_of(figure))
