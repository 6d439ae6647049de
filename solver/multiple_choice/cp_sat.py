"""OR-Tools' CP-SAT on choices."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from solver.integers import ScaledValues
from solver.multiple_choice.problem import MultipleChoiceProblem, certify_choice
from solver.multiple_choice.relaxation import ChoiceRelaxation
from solver.solution import Solution

NONE = -1


@dataclass(frozen=True)
class Choices:
    """Items that may exclude and need each other: a problem, or a part of one, as CP-SAT is given it.

    Attributes:
        values: What each item is worth, 0 or more. float64 ``[M]``.
        costs: What each item costs, 0 or more. int64 ``[M]``.
        classes: At most one item of the same class is taken; -1: of none. int64 ``[M]``.
        needs: The item without which this one is not taken; -1: none. int64 ``[M]``.
    """

    values: np.ndarray
    costs: np.ndarray
    classes: np.ndarray
    needs: np.ndarray


@dataclass(frozen=True)
class Search:
    """What CP-SAT found.

    Attributes:
        taken: The items taken. bool ``[M]``.
        bound: What no choice exceeds; infinite if nothing was found in time.
        work: What the search used up of its limit.
    """

    taken: np.ndarray
    bound: float
    work: float


@dataclass(frozen=True)
class MultipleChoiceCpSat:
    """CP-SAT on the whole problem: for up to a few thousand classes, and as a second opinion on the core method.

    It runs in one thread from a fixed seed, and its limit counts its work and not the clock, so that a slow or busy
    machine answers the same. With nothing found by then, it takes nothing.

    Attributes:
        work_limit: OR-Tools' deterministic time, in units of roughly a second, after which the search stops.
    """

    work_limit: float = 10.0

    def solve(self, problem: MultipleChoiceProblem) -> Solution:
        """Choose by constraint programming; the bound is the lower of CP-SAT's and the relaxation's."""
        started = time.perf_counter()
        positions = problem.eligible()
        classes, exclusive = problem.classes[positions], problem.exclusive[positions]
        # One more item a class, free and worthless, stands for leaving it to its members.
        contested = np.unique(classes[exclusive])
        stands_for_members = positions.size + np.searchsorted(contested, classes)
        choices = Choices(
            values=np.append(problem.values[positions], np.zeros(contested.size)),
            costs=np.append(problem.costs[positions], np.zeros(contested.size, dtype=np.int64)),
            classes=np.append(np.where(exclusive, classes, NONE), contested),
            needs=np.append(
                np.where(~exclusive & np.isin(classes, contested), stands_for_members, NONE),
                np.full(contested.size, NONE),
            ),
        )
        search = choose(choices, problem.budget, self.work_limit, slack=0.0)
        chosen = np.zeros(problem.num_items, dtype=bool)
        chosen[positions[search.taken[: positions.size]]] = True
        bound = min(ChoiceRelaxation.of(problem).bound, search.bound)
        return certify_choice(problem, chosen, bound, time.perf_counter() - started)


def choose(choices: Choices, budget: int, work_limit: float, slack: float) -> Search:
    """Search all choices within the budget.

    Args:
        choices: What there is to choose from.
        budget: The most that the choice may cost.
        work_limit: The deterministic time after which the search stops.
        slack: The difference of bound and value at which the search stops.
    """
    if (choices.classes == NONE).all() and choices.costs.sum() <= budget:
        return Search(np.ones(choices.values.size, dtype=bool), float(choices.values.sum()), 0.0)

    from ortools.sat.python import cp_model  # a second of imports, for whoever solves with it

    scaled = ScaledValues.of(choices.values)
    model = cp_model.CpModel()
    take = [model.new_bool_var("") for _ in choices.values]
    # CP-SAT takes no budget beyond int64.
    within = min(budget, int(choices.costs.sum()))
    model.add(cp_model.LinearExpr.weighted_sum(take, choices.costs.tolist()) <= within)
    for members in _by_class(choices.classes):
        model.add_at_most_one(take[item] for item in members)
    for item in np.flatnonzero(choices.needs != NONE).tolist():
        model.add_implication(take[item], take[choices.needs[item]])
    model.maximize(cp_model.LinearExpr.weighted_sum(take, scaled.integers.tolist()))

    search = cp_model.CpSolver()
    search.parameters.max_deterministic_time = work_limit
    search.parameters.absolute_gap_limit = float(np.ldexp(slack, scaled.exponent))
    # By default no linear relaxation knows which items exclude each other: 34 were not settled in 5 units of work.
    search.parameters.linearization_level = 2
    # On cores of 500 and 1,300 items presolve took some sixty times as long as the search without it.
    search.parameters.cp_model_presolve = False
    search.parameters.num_workers = 1
    search.parameters.random_seed = 0
    status = search.solve(model)

    work = search.response_proto.deterministic_time
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        # The bound it then reports is 0, which bounds nothing.
        return Search(np.zeros(len(take), dtype=bool), np.inf, work)
    taken = np.fromiter((search.boolean_value(variable) for variable in take), bool, len(take))
    return Search(taken, scaled.real(int(search.best_objective_bound)), work)


def _by_class(classes: np.ndarray) -> list[list[int]]:
    """The items of each class."""
    order = np.argsort(classes, kind="stable")
    order = order[classes[order] != NONE]
    borders = np.flatnonzero(np.diff(classes[order])) + 1
    return [members.tolist() for members in np.split(order, borders) if members.size]
