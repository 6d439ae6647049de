"""Comparison of multiple-choice solvers: CPU time and certified gap.

    python -m tests.benchmarks.solvers.multiple_choice > tests/benchmarks/results/multiple_choice.md

Takes a few minutes, mostly for searches that reach their limits. ``--largest 1000`` stops at 1,000 classes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from solver import (
    MultipleChoiceCore,
    MultipleChoiceCpSat,
    MultipleChoiceGreedy,
    MultipleChoiceProblem,
    MultipleChoiceSolver,
    Status,
)

SIZES = [100, 1_000, 10_000, 100_000]
LARGEST_FOR_WHOLE_SEARCH = 1_000
NUM_OPTIONS, NUM_MEMBERS = 6, 20
# Fraction of the total cost of the most expensive option of each class.
BUDGET = 0.1
WORK = 2.0

COLUMNS: dict[str, MultipleChoiceSolver] = {
    "Greedy": MultipleChoiceGreedy(),
    "Core, gap 1e-4": MultipleChoiceCore(relative_gap=1e-4, work_limit=WORK),
    "Core": MultipleChoiceCore(work_limit=WORK),
    "CpSat": MultipleChoiceCpSat(work_limit=WORK),
}

Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def matrices(rng: np.random.Generator, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """LoRA of rank 1 to 16, whole matrices of random widths, and twenty of their rows, with diminishing returns."""
    widths = rng.choice([384, 768, 1152, 1536], (num_classes, 2))
    ranks = np.array([1, 2, 4, 8, 16]) * widths.sum(axis=1, keepdims=True)
    rows = np.repeat(widths[:, 1:], NUM_MEMBERS, axis=1)
    costs = np.hstack((ranks, widths.prod(axis=1, keepdims=True), rows))
    worth = rng.lognormal(0, 1, (num_classes, 1))
    return worth * costs**0.6 * rng.lognormal(0, 0.3, costs.shape), costs


def uniform(rng: np.random.Generator, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Uniform values and costs, independent; options have the size of all members together."""
    size = np.append(np.full(NUM_OPTIONS, NUM_MEMBERS), np.ones(NUM_MEMBERS, dtype=int))
    shape = (num_classes, size.size)
    return rng.random(shape) * size, rng.integers(1, 10_001, shape) * size


def correlated(rng: np.random.Generator, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Value = cost + 100, 'strongly correlated': the literature's hard case."""
    _, costs = uniform(rng, num_classes)
    return costs + 100.0, costs


DRAWS: list[Draw] = [matrices, uniform, correlated]


def problem_of(draw: Draw, num_classes: int) -> MultipleChoiceProblem:
    """Return a problem with six options and twenty members per class, seed 0."""
    values, costs = draw(np.random.default_rng(0), num_classes)
    exclusive = np.arange(NUM_OPTIONS + NUM_MEMBERS) < NUM_OPTIONS
    return MultipleChoiceProblem(
        values.ravel(),
        costs.ravel(),
        int(costs[:, exclusive].max(axis=1).sum() * BUDGET),
        np.repeat(np.arange(num_classes), exclusive.size),
        np.tile(exclusive, num_classes),
    )


def cell(solver: MultipleChoiceSolver, problem: MultipleChoiceProblem) -> str:
    """Format the seconds of CPU time, and the gap or 'optimal'."""
    if isinstance(solver, MultipleChoiceCpSat) and np.unique(problem.classes).size > LARGEST_FOR_WHOLE_SEARCH:
        return "–"
    started = time.process_time()
    solution = solver.solve(problem)
    gap = "optimal" if solution.status is Status.OPTIMAL else f"{solution.gap:.1e}"
    return f"{time.process_time() - started:.2f} s, {gap}"


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="largest number of classes")
    largest = parser.parse_args().largest

    print("# Multiple-choice solvers\n")
    arguments = " ".join(["", *sys.argv[1:]])
    print(
        f"`python -m tests.benchmarks.solvers.multiple_choice{arguments} > "
        "tests/benchmarks/results/multiple_choice.md`\n"
    )
    libraries = ", ".join(f"{name} {version(name)}" for name in ("ortools", "numpy"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}.\n")
    print(
        "Each cell: seconds of CPU time (other work on the machine affects it less than wall-clock time), then the "
        "certified gap `(bound - value) / bound`, or 'optimal' if that is proven. One run of each, seed 0; "
        f"{NUM_OPTIONS} options and {NUM_MEMBERS} members per class; budget {BUDGET:.0%} of the total cost of the most "
        f"expensive option of each class. Core and CpSat search for at most {WORK:g} units of OR-Tools' deterministic "
        f"time. –: not tried above {LARGEST_FOR_WHOLE_SEARCH:,} classes.\n"
    )
    print("| classes | items | values and costs |", " | ".join(COLUMNS), "|")
    print("|---:|---:|---|" + "---|" * len(COLUMNS))
    for num_classes in SIZES:
        if num_classes > largest:
            break
        for draw in DRAWS:
            problem = problem_of(draw, num_classes)
            cells = [cell(solver, problem) for solver in COLUMNS.values()]
            print(f"| {num_classes:,} | {problem.num_items:,} | {draw.__name__} |", " | ".join(cells), "|")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
