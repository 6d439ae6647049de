"""The frontier of a run: its predicted loss decrease under other budgets."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from adapeft.choose.elements_frontier import elements_frontier
from adapeft.choose.fewest import ENOUGH
from adapeft.choose.knapsack import most_valuable
from adapeft.choose.options import choice_problem
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.measure.storage import ELEMENTS, TABLE, load_elements, load_groups, load_options
from adapeft.methods.registry import get_method
from adapeft.servers import MAX_RANK
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from cluster.output.folder import RunFolder
from solver import Frontier, choice_frontier, frontier

_SHARES = (*(Fraction(n, 10**d) for d in range(5, 0, -1) for n in (1, 2, 5)), Fraction(1))


class RunFrontier(NamedTuple):
    """The frontier of a run.

    Attributes:
        curve: predicted loss decrease at each budget.
        num_total: number of parameters of the model.
        budget: budget of the run.
    """

    curve: Frontier
    num_total: int
    budget: int

    @property
    def enough(self) -> int | None:
        """The smallest of the budgets that has ``ENOUGH`` of the value of the run's; None if only the run's has."""
        of_run = self.curve.values[self.curve.budgets == self.budget]
        found = self.curve.budgets[self.curve.values >= ENOUGH * of_run] if of_run.size else self.curve.budgets[:0]
        return int(found[0]) if found.size and found[0] < self.budget else None


def frontier_of(folder: RunFolder, subset: Subset) -> RunFrontier | None:
    """Return the frontier at the budget of the run and at round shares of the model's parameters.

    Of single elements also at 1, 2, 5, 10, … below the smallest share.

    None if the run has no values of groups: it measured none, or single elements that count one by one.
    """
    if not (folder.path / TABLE).is_file():
        return None
    groups, columns, key = load_groups(folder.path)
    if not columns:
        return None
    said = subset.choice
    if groups.granularity == "element":
        return _of_elements(folder, groups, said) if said.unspent is not None else None
    method, reach = get_method(said.needed("method")), float(said.needed("reach"))
    budget = said.needed("budget")
    statistics = Statistics(groups, columns, options=load_options(folder.path, groups))
    values = method.group_values(statistics, reach)
    if values is None:
        return None
    if key.get("select.servable"):
        values = np.where(most_valuable(groups, values, MAX_RANK), values, 0.0)
    available = int(groups.counts.sum())
    counts = {budget, *_round_shares(groups.num_total)}
    budgets = sorted(count for count in counts if groups.counts.min() <= count <= available)
    if statistics.options is None:
        return RunFrontier(frontier(values, groups.counts, budgets), groups.num_total, budget)
    worth = method.option_values(statistics, reach)
    assert worth is not None
    problem = choice_problem(groups, values, statistics.options, worth, budget, kinds=key["select.options"])
    return RunFrontier(choice_frontier(problem, budgets), groups.num_total, budget)


def _of_elements(folder: RunFolder, groups: Groups, said: Choice) -> RunFrontier | None:
    if not (folder.path / ELEMENTS).is_dir():  # a choice from the statistics of another run
        return None
    elements = load_elements(folder.path, groups)
    budget, reach = int(said.needed("budget")), float(said.needed("reach"))
    shares = _round_shares(groups.num_total)
    # A few hundred elements may promise all that there is: 399 of SmolLM2-135M's, of which the smallest share is 1,345.
    counts = {budget, *shares, *_round_numbers(below=shares[0])}
    budgets = sorted(count for count in counts if 0 < count <= int(groups.counts.sum()))
    return RunFrontier(elements_frontier(elements, budgets, reach), groups.num_total, budget)


def _round_shares(total: int) -> list[int]:
    """Return the counts that are round shares of ``total``, those above 0."""
    # Rounded down like a budget of the config, so that the run's own budget does not appear twice.
    return [count for share in _SHARES if (count := math.floor(share * total))]


def _round_numbers(below: int) -> list[int]:
    """Return 1, 2, 5, 10, … ``below`` a number."""
    return [number for power in range(len(str(below))) for n in (1, 2, 5) if (number := n * 10**power) < below]


def knee_of(costs: np.ndarray, values: np.ndarray) -> int:
    """Return the index of the knee: the point farthest above the line from the origin to the last point.

    Up to there a further parameter adds more value than the average parameter of the largest budget, and beyond it
    less. The difference of the normalized curves is that of Satopää et al. 2011 (Kneedle), here on linear axes.

    Args:
        costs: numbers of parameters, ascending, positive. [B].
        values: value of the best subset, never descending; the last is positive. [B].
    """
    return int(np.argmax(values / values[-1] - costs / costs[-1]))
