"""The frontier: predicted loss decrease against the number of trained parameters."""

from __future__ import annotations

import numpy as np

from adapeft.choose.fewest import ENOUGH
from cluster.output.frontier import RunFrontier, knee_of
from cluster.output.pictures.picture import Picture, count_along, new_figure, png_of
from cluster.units import percent_of


def draw_frontier(front: RunFrontier, unit: str) -> Picture | None:
    """Draw the frontier with the run's budget and the knee; None if every budget has the value 0.

    Args:
        front: frontier of the run.
        unit: what the values are.
    """
    curve = front.curve
    if len(curve.budgets) < 2 or curve.values[-1] <= 0:
        return None
    figure = new_figure(3.4)
    axes = figure.subplots()
    axes.plot(curve.budgets, curve.values, color="C0", marker="o", markersize=3, label="best subset found")
    # Costs, because a subset may leave some of its budget unspent.
    at = knee_of(curve.costs, curve.values)
    knee = int(curve.budgets[at])
    axes.plot(knee, curve.values[at], "D", color="C2", markersize=15, fillstyle="none", label="knee")
    said = ""
    found = np.flatnonzero(curve.budgets == front.budget)
    if len(found):
        value = curve.values[found[0]]
        axes.plot(front.budget, value, "*", color="C3", markersize=12, label="budget of the run")
        share = value / curve.values[-1]
        said = f" The run's budget of {front.budget:,} parameters reaches {share:.0%} of what the largest one reaches."
        if front.enough is not None:
            said += f" {ENOUGH:.0%} of the run's takes {front.enough:,} parameters or fewer (select.budget: auto)."
    count_along(axes)
    axes.set(xlabel="parameters to train", ylabel=unit, ylim=(0, 1.1 * curve.values[-1]))
    axes.legend(frameon=False, labelspacing=0.9)
    caption = (
        f"Sum of the {unit} over the best subset of each budget, on a logarithmic axis of parameters.{said} The knee "
        f"is at {knee:,} parameters ({percent_of(knee / front.num_total)} of the model): beyond it, a further "
        "parameter adds less than the average parameter of the largest budget drawn."
    )
    return Picture("frontier", "Frontier", caption, png_of(figure))
