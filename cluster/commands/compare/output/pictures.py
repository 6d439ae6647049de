"""The pictures of a comparison: scores against cost, their spread over the seeds, and the sweeps of learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cluster.commands.compare.output.row import Row
from cluster.output.pictures.picture import Picture, add_legend, count_along, new_figure, png_of

_COLUMNS = 2
_DASHES = ("-", "--", ":", "-.")


def pictures_of(rows: Sequence[Row], metric: str) -> list[Picture]:
    """Return the pictures of a comparison; none without a score, and those of the seeds and the sweep if there are any.

    Args:
        rows: one per method and budget.
        metric: name of the score.
    """
    if not any(row.scores for row in rows):
        return []
    drawn = [draw_scores(rows, metric), draw_bytes(rows, metric)]
    if any(len(row.scores) > 1 for row in rows):
        drawn.append(draw_spread(rows, metric))
    if any(row.swept and np.isfinite(list(row.swept.scores.values())).any() for row in rows):
        drawn.append(draw_rates(rows, metric))
    return drawn


def draw_scores(rows: Sequence[Row], metric: str) -> Picture:
    """Draw scores with standard deviations against trained parameters, as Figure 5 of Fu et al. 2023, upper half."""
    caption = (
        f"{metric} after the last step against the number of trained parameters, on a logarithmic axis: mean over the "
        "seeds with one standard deviation."
    )
    png = _with_errors(rows, metric, "trained parameters", lambda row: row.trained)
    return Picture("scores", "Score by trained parameters", caption, png)


def draw_bytes(rows: Sequence[Row], metric: str) -> Picture:
    """Draw scores with standard deviations against the size of the delta."""
    caption = (
        f"{metric} after the last step against the size of the file to ship, on a logarithmic axis: mean over the "
        "seeds with one standard deviation. A single element takes 5 to 8 bytes, with its position; one of a row or "
        "of LoRA takes 4."
    )
    png = _with_errors(rows, metric, "KiB of the delta", lambda row: row.delta_bytes / 2**10)
    return Picture("bytes", "Score by size of the delta", caption, png)


def draw_spread(rows: Sequence[Row], metric: str) -> Picture:
    """Draw standard deviations over the seeds against trained parameters, as Figure 5, lower half."""
    lines = _lines(rows)
    figure, axes = _new(len(lines))
    for index, line in enumerate(lines):
        x, y = [row.trained for row in line], [row.std for row in line]
        axes.plot(x, y, label=line[-1].method, **_style(index))
    count_along(axes)
    axes.set(xlabel="trained parameters", ylabel=f"standard deviation of {metric}", ylim=(0, None))
    caption = f"Standard deviation of {metric} over the seeds against the number of trained parameters."
    return Picture("spread", "Spread over the seeds", caption, _finished(figure))


def draw_rates(rows: Sequence[Row], metric: str) -> Picture:
    """Draw the scores of the sweep by learning rate; the rate at which each method was then run is circled."""
    lines = [(row, row.swept) for row in rows if row.swept]
    methods, budgets = (list(dict.fromkeys(getattr(row, name) for row, _ in lines)) for name in ("method", "budget"))
    figure, axes = _new(len(lines))
    for row, swept in lines:
        style = _style(methods.index(row.method)) | {"linestyle": _DASHES[budgets.index(row.budget) % len(_DASHES)]}
        label = f"{row.method}, {row.budget}" if row.budget else row.method
        axes.plot(list(swept.scores), list(swept.scores.values()), label=label, **style)
        best = [swept.scores.get(rate, np.nan) for rate in row.learning_rates]
        axes.plot(row.learning_rates, best, "o", color=style["color"], fillstyle="none", markersize=11)
        axes.plot(list(swept.stopped), [swept.scores[rate] for rate in swept.stopped], "kx", markersize=8)
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"{metric} on held-out training data")
    caption = (
        f"Sweep of the learning rate: {metric} of the first seed on a part of the training data that was held out, for "
        "each method and budget; the circle is the one taken. "
    )
    if any(swept.stopped for _, swept in lines):
        caption += "At a cross the training was stopped early, because others had better scores at the same step. "
    else:
        caption += "A climb from the middle rate tries only as many as it needs. "
    caption += "Rates at which training failed are left out."
    return Picture("rates", "Learning rates", caption, _finished(figure))


def _with_errors(rows: Sequence[Row], metric: str, what: str, cost: Callable[[Row], float]) -> bytes:
    lines = _lines(rows)
    figure, axes = _new(len(lines))
    for index, line in enumerate(lines):
        errors = [0.0 if np.isnan(row.std) else row.std for row in line]
        x, y = [cost(row) for row in line], [row.mean for row in line]
        axes.errorbar(x, y, yerr=errors, capsize=3, label=line[-1].method, **_style(index))
    count_along(axes)
    axes.set(xlabel=what, ylabel=metric)
    return _finished(figure)


def _new(num_lines: int) -> tuple[Any, Any]:
    """Return a figure with room for the legend below its axes."""
    figure = new_figure(3.2 + 0.2 * -(-num_lines // _COLUMNS))
    return figure, figure.subplots()


def _finished(figure: Any) -> bytes:
    add_legend(figure, _COLUMNS)
    return png_of(figure)


def _style(index: int) -> dict[str, Any]:
    """Return the style of a line: after matplotlib's ten colours the marker changes, so that methods differ."""
    return {"color": f"C{index % 10}", "marker": "osD^v"[index // 10 % 5], "markersize": 4}


def _lines(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows with scores of each method, in the order of trained parameters."""
    names = dict.fromkeys(row.method for row in rows if row.scores)
    scored = ([row for row in rows if row.method == name and row.scores] for name in names)
    return [sorted(line, key=lambda row: row.trained) for line in scored]
