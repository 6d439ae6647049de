"""Rows, whole tensors and LoRA of several ranks in one subset: a multiple-choice knapsack over the matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapeft.choose.knapsack import STABLE_GAP, check_values, most_valuable, parts_of, with_solution
from adapeft.measure.groups import Groups
from adapeft.measure.options import Options
from adapeft.parts.lora import Lora
from adapeft.parts.part import Part
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from solver import MultipleChoiceCore, MultipleChoiceGreedy, MultipleChoiceProblem


def choose_options(
    groups: Groups,
    values: np.ndarray,
    options: Options,
    option_values: np.ndarray,
    budget: int,
    *,
    kinds: Sequence[str],
    greedy: bool = False,
    most_rows: int | None = None,
) -> Subset:
    """Choose the best rows and options within ``budget`` elements; see ``choice_problem``.

    Args:
        kinds: kinds that may be chosen, those of ``select.options``.
        greedy: whether to choose greedily by value per element.
        most_rows: largest number of rows of one matrix; None: any number.
    """
    check_values(groups, values)
    values = np.where(most_valuable(groups, values, most_rows), values, 0.0)
    problem = choice_problem(groups, values, options, option_values, budget, kinds=kinds)
    solver = MultipleChoiceGreedy() if greedy else MultipleChoiceCore(relative_gap=STABLE_GAP)
    solution = solver.solve(problem)
    taken = np.flatnonzero(solution.chosen[groups.num_groups :])
    of_options = {
        groups.parameters[options.parameters[option]].name: _part(groups, options, option) for option in taken.tolist()
    }
    parts = {**parts_of(groups, solution.chosen[: groups.num_groups]), **of_options}
    in_order = {info.name: parts[info.name] for info in groups.parameters if info.name in parts}
    return with_solution(Subset(in_order), solution)


def choice_problem(
    groups: Groups,
    values: np.ndarray,
    options: Options,
    option_values: np.ndarray,
    budget: int,
    *,
    kinds: Sequence[str],
) -> MultipleChoiceProblem:
    """Return the problem whose items are the groups [K], then the options [N].

    Each matrix can have some of its rows, or one option, or nothing.

    Args:
        values: values of the groups, float64 [K].
        option_values: values of the options, float64 [N].
        kinds: kinds that may be chosen: without ``row`` no rows of matrices, and with ``lora`` alone no vectors, which
            would train whole at LoRA's learning rate (nl2bash: a loss of 2.09 with norms and 2.00 without).
    """
    is_row = groups.is_row[groups.parameter_of]
    is_candidate = np.where(is_row, "row" in kinds, "row" in kinds or "tensor" in kinds)
    return MultipleChoiceProblem(
        values=np.concatenate([np.where(is_candidate, values, 0.0), option_values]),
        costs=np.concatenate([groups.counts, options.counts]),
        budget=budget,
        classes=np.concatenate([np.where(is_row, groups.parameter_of, -1), options.parameters]),
        exclusive=np.concatenate([np.zeros(groups.num_groups, dtype=bool), np.ones(len(options.counts), dtype=bool)]),
    )


def options_of(groups: Groups, options: Options, subset: Subset) -> np.ndarray:
    """Return the number of elements of each option that ``subset`` trains, int64 [N]."""
    trained = np.zeros(len(options.counts), dtype=np.int64)
    for option, index in enumerate(options.parameters):
        part = subset.parts.get(groups.parameters[index].name)
        if part == _part(groups, options, option):
            trained[option] = part.count
    return trained


def _part(groups: Groups, options: Options, option: int) -> Part:
    info = groups.parameters[options.parameters[option]]
    rank = int(options.ranks[option])
    if not rank:
        return Whole(info.shape)
    return Lora(info.shape, info.output_dim or 0, rank, float(rank))
