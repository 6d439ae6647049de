"""Groups under a budget: a 0-1 knapsack."""

from __future__ import annotations

import numpy as np
import torch

from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.parts.part import Part
from adapeft.subset.subset import Subset
from solver import CoreKnapsack, KnapsackProblem, Solution, Solver

STABLE_GAP = 1e-4
"""Relative gap to the bound within which the choice by density order is kept, without branch and bound.

Values have rounding errors of about 1e-6, which depend on world size and ZeRO stage, and a standard error of several
percent. Among near-optimal sets within 1e-6 of each other, branch and bound would pick a different one each time. The
density order is stable, and its cost is reported as the gap.
"""


def choose_groups(
    groups: Groups,
    values: np.ndarray,
    budget: int,
    solver: Solver | None = None,
    costs: np.ndarray | None = None,
    *,
    most_rows: int | None = None,
) -> Subset:
    """Choose the groups of largest total value [K] within ``budget``, in elements or in the unit of ``costs`` [K].

    At most ``most_rows`` rows of each matrix are chosen; None: any number.
    """
    check_values(groups, values)
    values = np.where(most_valuable(groups, values, most_rows), values, 0.0)  # which no solver chooses
    solution = knapsack(values, groups.counts if costs is None else costs, budget, solver)
    return with_solution(Subset(parts_of(groups, solution.chosen)), solution)


def with_solution(subset: Subset, solution: Solution) -> Subset:
    """Return the subset described by its solution: value, bound, gap and status."""
    return subset.described(
        value=solution.value,
        bound=solution.bound,
        gap=solution.gap,
        status=solution.status.name.lower(),
        advice=solution.status.advice,
        solve_seconds=solution.seconds,
        num_groups=solution.chosen.size,
        num_chosen=int(solution.chosen.sum()),
    )


def most_valuable(groups: Groups, values: np.ndarray, most_rows: int | None) -> np.ndarray:
    """Return a mask [K] of all groups except those after the ``most_rows`` most valuable rows of a matrix.

    All rows of a matrix cost the same, so a best choice with at most as many rows of each consists of these.
    """
    mask = np.ones(groups.num_groups, dtype=bool)
    if most_rows is not None:
        for index in np.flatnonzero(groups.is_row).tolist():
            members = groups.span(index)
            mask[members][np.argsort(-values[members], kind="stable")[most_rows:]] = False
    return mask


def check_values(groups: Groups, values: np.ndarray) -> None:
    """Check that the values [K] of groups are finite.

    Raises:
        AdapeftError: a value is not finite; the message names its parameter.
    """
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise AdapeftError(
            f"the value of {groups.parameters[groups.parameter_of[bad[0]]].name!r} is {values[bad[0]]:g} ({len(bad):,} "
            f"such values): its statistics or select.reach are too large. Lower select.reach, and check the scale of "
            f"the targets."
        )


def knapsack(values: np.ndarray, costs: np.ndarray, budget: int, solver: Solver | None = None) -> Solution:
    """Solve the knapsack of these values and costs, both [K], by the core method unless a solver is given."""
    solver = solver or CoreKnapsack(relative_gap=STABLE_GAP)
    return solver.solve(KnapsackProblem(values, costs, budget))


def parts_of(groups: Groups, chosen: np.ndarray) -> dict[str, Part]:
    """Return the parts that a mask [K] over groups (not elements) selects."""
    parts: dict[str, Part] = {}
    for index, info in enumerate(groups.parameters):
        mask = chosen[groups.span(index)]
        if not mask.any():
            continue
        parts[info.name] = groups.part(index, torch.from_numpy(np.flatnonzero(mask)))
    return parts


def chosen_of(groups: Groups, subset: Subset) -> np.ndarray:
    """Return the number of elements of each group that ``subset`` trains, int64 [K]; the inverse of ``parts_of``."""
    trained = np.zeros(groups.num_groups, dtype=np.int64)
    for index, info in enumerate(groups.parameters):
        part = subset.parts.get(info.name)
        if part is None:
            continue
        members = groups.span(index)
        if groups.is_row[index]:  # a part that is added next to a matrix trains none of its rows
            rows = part.whole_rows(int(groups.sizes[index])).numpy()
            trained[members][rows] = groups.counts[members][rows]
        else:
            trained[members] += part.count
    return trained
