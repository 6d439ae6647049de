"""OR-Tools' CP-SAT for knapsacks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from solver.integers import ScaledValues
from solver.problem import KnapsackProblem
from solver.relaxation import Relaxation
from solver.solution import Solution, certify


@dataclass(frozen=True)
class CpSat:
    """CP-SAT on the whole problem: for up to a few thousand items, and to cross-check the other solvers.

    It runs in one thread with a fixed seed, so the result is reproducible if the search finishes. If it finds no
    solution in time, it takes no items.

    Attributes:
        time_limit: Time limit of the search in seconds.
    """

    time_limit: float = 10.0

    def solve(self, problem: KnapsackProblem) -> Solution:
        """Choose by constraint programming; the bound is the lower of CP-SAT's and the relaxation's."""
        started = time.perf_counter()
        relaxation = Relaxation.of(problem)
        taken, bound = constrain(relaxation.values, relaxation.costs, relaxation.budget, self.time_limit)
        chosen = relaxation.chosen(taken, problem.num_items)
        return certify(problem, chosen, min(relaxation.bound, bound), time.perf_counter() - started)


def constrain(values: np.ndarray, costs: np.ndarray, budget: int, time_limit: float) -> tuple[np.ndarray, float]:
    """Search all subsets of items with positive values (float64 ``[M]``) whose costs (int64 ``[M]``) fit the budget.

    Returns:
        The items taken (bool ``[M]``), and an upper bound on the value of any subset, infinite if no solution was found
        in time.
    """
    if costs.sum() <= budget:
        # CP-SAT rejects budgets beyond int64.
        return np.ones(len(values), dtype=bool), float(values.sum())

    from ortools.sat.python import cp_model  # imported here: it takes a second

    scaled = ScaledValues.of(values)
    model = cp_model.CpModel()
    take = [model.new_bool_var("") for _ in values]
    model.add(cp_model.LinearExpr.weighted_sum(take, costs.tolist()) <= budget)
    model.maximize(cp_model.LinearExpr.weighted_sum(take, scaled.integers.tolist()))

    search = cp_model.CpSolver()
    search.parameters.max_time_in_seconds = time_limit
    search.parameters.num_workers = 1
    search.parameters.random_seed = 0
    status = search.solve(model)

    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        # CP-SAT then reports a bound of 0, which is not a bound.
        return np.zeros(len(take), dtype=bool), np.inf
    taken = np.fromiter((search.boolean_value(variable) for variable in take), bool, len(take))
    return taken, scaled.real(int(search.best_objective_bound))
