"""Knapsacks of up to ten million items, 0-1 and multiple-choice: a subset, its value, and a certified bound on any's.

Numbers alone: numpy in, numpy out. What the items are is the caller's business.
"""

from __future__ import annotations

from solver.branch_and_bound import BranchAndBound
from solver.core import CoreKnapsack
from solver.cp_sat import CpSat
from solver.frontier import Frontier, choice_frontier, frontier
from solver.greedy import Greedy
from solver.multiple_choice.core import MultipleChoiceCore
from solver.multiple_choice.cp_sat import MultipleChoiceCpSat
from solver.multiple_choice.greedy import MultipleChoiceGreedy
from solver.multiple_choice.problem import MultipleChoiceProblem, MultipleChoiceSolver
from solver.problem import KnapsackProblem
from solver.solution import Solution, Solver, Status

__all__ = [
    "BranchAndBound",
    "CoreKnapsack",
    "CpSat",
    "Frontier",
    "Greedy",
    "KnapsackProblem",
    "MultipleChoiceCore",
    "MultipleChoiceCpSat",
    "MultipleChoiceGreedy",
    "MultipleChoiceProblem",
    "MultipleChoiceSolver",
    "Solution",
    "Solver",
    "Status",
    "choice_frontier",
    "frontier",
]
