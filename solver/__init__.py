"""0-1 knapsacks of up to ten million items: a subset, its value, and a certified bound on any subset's.

Numbers alone: numpy in, numpy out. What the items are is the caller's business.
"""

from __future__ import annotations

from solver.branch_and_bound import BranchAndBound
from solver.core import CoreKnapsack
from solver.cp_sat import CpSat
from solver.frontier import Frontier, frontier
from solver.greedy import Greedy
from solver.problem import KnapsackProblem
from solver.solution import Solution, Solver, Status

__all__ = [
    "BranchAndBound",
    "CoreKnapsack",
    "CpSat",
    "Frontier",
    "Greedy",
    "KnapsackProblem",
    "Solution",
    "Solver",
    "Status",
    "frontier",
]
