"""OR-Tools' CP-SAT for multiple-choice knapsacks."""

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
    """Items that may exclude and require each other: a problem or a part of one in the form for CP-SAT.

    Attributes:
        values: Value of each item, 0 or more. float64 ``[M]``.
        costs: Cost of each item, 0 or more. int64 ``[M]``.
        classes: Class of each item, of which at most one item is taken; -1 for no class. int64 ``[M]``.
        needs: Item that each item requires; -1 for none. int64 ``[M]``.
    """

    values: np.ndarray
    costs: np.ndarray
    classes: np.ndarray
    needs: np.ndarray


@dataclass(frozen=True)
class Search:
    """Result of CP-SAT.

    Attributes:
        taken: True for items that are taken. bool ``[M]``.
        bound: Upper bound on the value of any choice; infinite if no solution was found within the limit.
        work: Deterministic time used by the search.
    """

    taken: np.ndarray
    bound: float
    work: float


@dataclass(frozen=True)
class MultipleChoiceCpSat:
    """CP-SAT on the whole problem: for up to a few thousand classes, and to cross-check the core method.

    It runs in one thread with a fixed seed and a limit in deterministic time, so the solution is the same on a slow or
    busy machine. If it finds no solution within the limit, it takes no items.

    Attributes:
        work_limit: Limit of the search in OR-Tools' deterministic time, in units of roughly a second.
    """

    work_limit: float = 10.0

    def solve(self, problem: MultipleChoiceProblem) -> Solution:
        """Choose by constraint programming; the bound is the lower of CP-SAT's and the relaxation's."""
        started = time.perf_counter()
        positions = problem.eligible()
        classes, exclusive = problem.classes[positions], problem.exclusive[positions]
        # One more item per class, with value and cost 0, stands for using the members of the class.
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
        choices: Items to choose from.
        budget: Maximum total cost of the choice.
        work_limit: Limit of the search in deterministic time.
        slack: Difference between bound and value at which the search stops.
    """
    if (choices.classes == NONE).all() and choices.costs.sum() <= budget:
        return Search(np.ones(choices.values.size, dtype=bool), float(choices.values.sum()), 0.0)

    from ortools.sat.python import cp_model  # imported here: it takes a second

    scaled = ScaledValues.of(choices.values)
    model = cp_model.CpModel()
    take = [model.new_bool_var("") for _ in choices.values]
    # CP-SAT rejects budgets beyond int64.
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
    # By default the linear relaxation ignores which items exclude each other: 34 were not settled in 5 units of work.
    search.parameters.linearization_level = 2
    # On cores of 500 and 1,300 items presolve took about sixty times as long as the search without it.
    search.parameters.cp_model_presolve = False
    search.parameters.num_workers = 1
    search.parameters.random_seed = 0
    status = search.solve(model)

    work = search.response_proto.deterministic_time
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        # CP-SAT then reports a bound of 0, which is not a bound.
        return Search(np.zeros(len(take), dtype=bool), np.inf, work)
    taken = np.fromiter((search.boolean_value(variable) for variable in take), bool, len(take))
    return Search(taken, scaled.real(int(search.best_objective_bound)), work)


def _by_class(classes: np.ndarray) -> list[list[int]]:
    """Return the items of each class."""
    order = np.argsort(classes, kind="stable")
    order = order[classes[order] != NONE]
    borders = np.flatnonzero(np.diff(classes[order])) + 1
    return [members.tolist() for members in np.split(order, borders) if members.size]
