"""Comparison of knapsack solvers: seconds and certified gap.

    python -m tests.benchmarks.solvers.knapsack > tests/benchmarks/results/knapsack.md

Takes about five minutes, mostly for searches that reach their time limits.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np

from solver import BranchAndBound, CoreKnapsack, CpSat, Greedy, KnapsackProblem, Solution, Solver, Status

SIZES = [10_000, 100_000, 1_000_000, 10_000_000]
LARGEST_FOR_WHOLE_SEARCH = 100_000
# Fraction of the cost of all items.
BUDGET = 0.1
# Costs of a transformer's groups: an element, a row of either width, a whole matrix.
GROUP_COSTS = [1, 384, 1536, 147456]

COLUMNS: dict[str, Solver] = {
    "Core, gap 1e-6, 10 s": CoreKnapsack(relative_gap=1e-6, time_limit=10.0),
    "Core, 10 s": CoreKnapsack(time_limit=10.0),
    "Greedy": Greedy(),
    "BranchAndBound, 10 s": BranchAndBound(time_limit=10.0),
    "CpSat, 20 s": CpSat(time_limit=20.0),
}

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def independent(rng: np.random.Generator, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal values, independent of the mixed costs."""
    return rng.lognormal(0, 2, num_items), rng.choice(GROUP_COSTS, num_items)


def proportional(rng: np.random.Generator, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Values proportional to the mixed costs within about 10 %, so that densities are similar."""
    costs = rng.choice(GROUP_COSTS, num_items)
    return costs * rng.lognormal(0, 0.1, num_items), costs


def uniform(rng: np.random.Generator, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Uniform values and costs, independent."""
    return rng.random(num_items), rng.integers(1, 100_001, num_items)


def correlated(rng: np.random.Generator, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Value = cost + 100, 'strongly correlated': the literature's hard case."""
    costs = rng.integers(1, 1001, num_items)
    return costs + 100.0, costs


DRAWS: list[Draw] = [independent, proportional, uniform, correlated]


def solutions(problem: KnapsackProblem) -> Iterator[Solution | None]:
    """Yield one solution per column, or None if the problem is too large for the solver."""
    for solver in COLUMNS.values():
        whole = isinstance(solver, BranchAndBound | CpSat)
        yield None if whole and problem.num_items > LARGEST_FOR_WHOLE_SEARCH else solver.solve(problem)


def cell(solution: Solution | None) -> str:
    """Format the seconds, and the gap or 'optimal'."""
    if solution is None:
        return "–"
    gap = "optimal" if solution.status is Status.OPTIMAL else f"{solution.gap:.1e}"
    return f"{solution.seconds:.3f} s, {gap}"


def main() -> None:
    """Print the table in Markdown."""
    print("# Knapsack solvers\n")
    print("`python -m tests.benchmarks.solvers.knapsack > tests/benchmarks/results/knapsack.md`\n")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("ortools", "numpy"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}.\n")
    print(
        "Each cell: seconds, then the certified gap `(bound - value) / bound`, or 'optimal' if that is proven. "
        f"One run of each, seed 0, budget {BUDGET:.0%} of all costs. "
        f"Costs of 'independent' and 'proportional' are drawn from {GROUP_COSTS}. "
        f"–: not tried above {LARGEST_FOR_WHOLE_SEARCH:,} items.\n"
    )
    print("| items | values and costs |", " | ".join(COLUMNS), "|")
    print("|---:|---|" + "---|" * len(COLUMNS))
    for num_items in SIZES:
        for draw in DRAWS:
            values, costs = draw(np.random.default_rng(0), num_items)
            problem = KnapsackProblem(values, costs, int(costs.sum() * BUDGET))
            cells = [cell(solution) for solution in solutions(problem)]
            print(f"| {num_items:,} | {draw.__name__} |", " | ".join(cells), "|")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
