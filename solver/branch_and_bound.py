"""OR-Tools' branch and bound for knapsacks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from ortools.algorithms.python import knapsack_solver

from solver.integers import ScaledValues
from solver.problem import KnapsackProblem
from solver.relaxation import Relaxation
from solver.solution import Solution, certify


@dataclass(frozen=True)
class BranchAndBound:
    """OR-Tools' knapsack solver on the whole problem: exact if it finishes, often with up to a few thousand items.

    When the time is up it returns the best subset found so far, which depends on the machine and may be worse than
    greedy's.

    Attributes:
        time_limit: Time limit of the search in seconds.
    """

    time_limit: float = 10.0

    def solve(self, problem: KnapsackProblem) -> Solution:
        """Choose by branch and bound; the bound is the relaxation's, or the optimum itself once that is proven."""
        started = time.perf_counter()
        relaxation = Relaxation.of(problem)
        taken, bound = branch(relaxation.values, relaxation.costs, relaxation.budget, self.time_limit)
        chosen = relaxation.chosen(taken, problem.num_items)
        return certify(problem, chosen, min(relaxation.bound, bound), time.perf_counter() - started)


def branch(values: np.ndarray, costs: np.ndarray, budget: int, time_limit: float) -> tuple[np.ndarray, float]:
    """Search all subsets of items with positive values (float64 ``[M]``) whose costs (int64 ``[M]``) fit the budget.

    Returns:
        The items taken (bool ``[M]``), and an upper bound on the value of any subset, infinite if time ran out.
    """
    if costs.sum() <= budget:
        # OR-Tools would return the same, but it rejects empty problems and budgets beyond int64.
        return np.ones(len(values), dtype=bool), float(values.sum())

    scaled = ScaledValues.of(values)
    search = knapsack_solver.KnapsackSolver(
        knapsack_solver.SolverType.KNAPSACK_MULTIDIMENSION_BRANCH_AND_BOUND_SOLVER, "knapsack"
    )
    search.set_time_limit(time_limit)
    search.init(scaled.integers.tolist(), [costs.tolist()], [budget])
    search.solve()

    taken = np.fromiter((search.best_solution_contains(item) for item in range(len(values))), bool, len(values))
    proven = search.is_solution_optimal()
    return taken, scaled.real(int(scaled.integers[taken].sum())) if proven else np.inf
