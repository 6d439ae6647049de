"""Solvers of 0-1 and multiple-choice knapsacks with up to ten million items, with a certified bound on the optimum.

Inputs and outputs are numpy arrays; the package does not depend on the meaning of the items.
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
