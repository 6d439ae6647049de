"""The multiple-choice knapsack with a price on the budget in place of its limit: a bound, and a price of decisions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solver.multiple_choice.problem import MultipleChoiceProblem

# In place of an option: the class is left to its members, or to nothing where they are not worth their price.
MEMBERS = -1


@dataclass(frozen=True)
class Candidates:
    """The eligible items of a problem, class by class; items of no class are the members of one that has no options.

    Members are listed by class, then by density, highest first, ties by position: the best use of any amount that is
    spent on the members of a class, if the last may be cut, is a first part of its list. Options are listed by class,
    then by cost.

    Attributes:
        num_classes: C, classes with an eligible item.
        budget: The budget in multiples of the costs' common divisor: the rest cannot be spent.
        members: Where each member is in the problem. int64 ``[M]``.
        member_values: Their values. float64 ``[M]``.
        member_costs: Their costs. int64 ``[M]``.
        member_classes: Their classes, from 0 to C - 1, ascending. int64 ``[M]``.
        options: Where each option is in the problem. int64 ``[O]``.
        option_values: Their values. float64 ``[O]``.
        option_costs: Their costs. int64 ``[O]``.
        option_classes: Their classes, ascending. int64 ``[O]``.
    """

    num_classes: int
    budget: int
    members: np.ndarray
    member_values: np.ndarray
    member_costs: np.ndarray
    member_classes: np.ndarray
    options: np.ndarray
    option_values: np.ndarray
    option_costs: np.ndarray
    option_classes: np.ndarray

    @classmethod
    def of(cls, problem: MultipleChoiceProblem) -> Candidates:
        """Sort the eligible items of a problem."""
        eligible = problem.eligible()
        names, classes = np.unique(problem.classes[eligible], return_inverse=True)
        values, costs = problem.values[eligible], problem.costs[eligible]
        exclusive = problem.exclusive[eligible]

        members = np.flatnonzero(~exclusive)
        # Stable, so that ties go by position, whatever the machine.
        members = members[np.lexsort((-values[members] / costs[members], classes[members]))]
        options = np.flatnonzero(exclusive)
        options = options[np.lexsort((costs[options], classes[options]))]
        return cls(
            num_classes=names.size,
            budget=problem.budget - problem.budget % max(1, int(np.gcd.reduce(costs))),
            members=eligible[members],
            member_values=values[members],
            member_costs=costs[members],
            member_classes=classes[members],
            options=eligible[options],
            option_values=values[options],
            option_costs=costs[options],
            option_classes=classes[options],
        )

    def sum_members(self, numbers: np.ndarray) -> np.ndarray:
        """Sums over each class's members of a number a member ``[M]``, in their type ``[C]``; 0 for no members."""
        sums = np.zeros(self.num_classes, dtype=numbers.dtype)
        starts = np.flatnonzero(np.diff(self.member_classes, prepend=-1))
        if starts.size:
            sums[self.member_classes[starts]] = np.add.reduceat(numbers, starts)
        return sums

    def best_options(self, surplus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each class's option of the largest surplus (of float64 ``[O]``), the cheapest of equals.

        Returns the options (int64 ``[C]``, `MEMBERS` where a class has none) and their surplus (``[C]``, then -inf).
        """
        best = np.full(self.num_classes, MEMBERS, dtype=np.int64)
        most = np.full(self.num_classes, -np.inf)
        starts = np.flatnonzero(np.diff(self.option_classes, prepend=-1))
        if starts.size:
            contested = self.option_classes[starts]
            most[contested] = np.maximum.reduceat(surplus, starts)
            largest = np.flatnonzero(surplus == most[self.option_classes])
            best[contested] = largest[np.searchsorted(largest, starts)]
        return best, most

    def mask(self, modes: np.ndarray, taken: np.ndarray, num_items: int) -> np.ndarray:
        """A mask by the problem's positions (bool ``[N]``) of each class's mode and the members that are taken.

        Args:
            modes: The option of each class, or `MEMBERS`. int64 ``[C]``.
            taken: The members to take where the mode is `MEMBERS`. bool ``[M]``.
            num_items: N.
        """
        chosen = np.zeros(num_items, dtype=bool)
        chosen[self.options[modes[modes != MEMBERS]]] = True
        chosen[self.members[taken & (modes[self.member_classes] == MEMBERS)]] = True
        return chosen


@dataclass(frozen=True)
class ChoiceRelaxation:
    r"""The Lagrangian relaxation of the budget, at the price λ that makes its bound the lowest.

    At a price of λ a unit, each class takes what has the largest surplus: all members worth more than their price, or
    one option,

    .. math::
        U(\lambda) = \lambda B + \sum_k s_k, \quad
        s_k = \max\Big(\sum_{m \in M_k} \max(0, v_m - \lambda c_m), \; \max_{o \in O_k} v_o - \lambda c_o\Big)

    which bounds the optimum for any λ ≥ 0. Its least value is that of the linear relaxation, for each class's
    constraints alone describe the convex hull of what is permitted there (they are the clique inequalities of a perfect
    graph): the convex hulls of the classes, merged by slope, until the budget breaks one (Sinha and Zoltners, *The
    multiple-choice knapsack problem*, 1979). A class takes less the higher the price, so the price is found by
    bisection, and no hull is ever built.

    Deciding something against the relaxation costs at least its penalty, the surplus that is lost: a choice that does
    so is worth at most U less the penalty.

    Attributes:
        candidates: What there is to choose from.
        price: λ, the least price at which what is taken fits the budget; 0 if everything does.
        modes: What each class takes at that price: an option, or `MEMBERS`. int64 ``[C]``.
        taken: The members worth more than their price, taken where the mode is `MEMBERS`. bool ``[M]``.
        room: What that leaves of the budget.
        bound: U.
        mode_penalties: What leaving a class to its members costs at least. float64 ``[C]``.
        option_penalties: What taking an option costs at least. float64 ``[O]``.
        member_penalties: What leaving a class to its members and deciding one of these against the relaxation costs at
            least. float64 ``[M]``.
    """

    candidates: Candidates
    price: float
    modes: np.ndarray
    taken: np.ndarray
    room: int
    bound: float
    mode_penalties: np.ndarray
    option_penalties: np.ndarray
    member_penalties: np.ndarray

    @classmethod
    def of(cls, problem: MultipleChoiceProblem) -> ChoiceRelaxation:
        """Relax a problem: one sort, then some 60 prices, each a look-up a class and a pass over the options."""
        candidates = Candidates.of(problem)
        demand = _Demand(candidates)
        price = _least_price(demand, candidates.budget)
        modes, ends = demand.at(price)
        taken = np.arange(candidates.members.size) < ends[candidates.member_classes]

        member_surplus = candidates.member_values - price * candidates.member_costs
        option_surplus = candidates.option_values - price * candidates.option_costs
        of_members = candidates.sum_members(np.maximum(0, member_surplus))
        surplus = np.maximum(of_members, candidates.best_options(option_surplus)[1])
        mode_penalties = surplus - of_members
        # Rounding of the price may turn the sign of a member that is worth exactly its price.
        against = np.maximum(0, np.where(taken, member_surplus, -member_surplus))
        return cls(
            candidates=candidates,
            price=price,
            modes=modes,
            taken=taken,
            room=candidates.budget - demand.cost(modes, ends),
            # At no price the budget counts for nothing, and it may be beyond float64.
            bound=(price * candidates.budget if price else 0.0) + float(surplus.sum()),
            mode_penalties=mode_penalties,
            option_penalties=surplus[candidates.option_classes] - option_surplus,
            member_penalties=mode_penalties[candidates.member_classes] + against,
        )


class _Demand:
    """What the classes take at a price."""

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._density = candidates.member_values / candidates.member_costs
        self._first = np.searchsorted(candidates.member_classes, np.arange(candidates.num_classes))
        self._end = np.searchsorted(candidates.member_classes, np.arange(candidates.num_classes), side="right")
        self._values = np.append(0.0, np.cumsum(candidates.member_values))
        self._costs = np.append(0, np.cumsum(candidates.member_costs))

    def highest_price(self) -> float:
        """A price at which nothing is taken."""
        options = self._candidates.option_values / self._candidates.option_costs
        return 2 * max(float(self._density.max(initial=0.0)), float(options.max(initial=0.0)))

    def at(self, price: float) -> tuple[np.ndarray, np.ndarray]:
        """Each class's mode, and the end of the members worth more than their price. int64 ``[C]`` both."""
        ends = self._ends(price)
        values = self._values[ends] - self._values[self._first]
        surplus = values - price * (self._costs[ends] - self._costs[self._first])
        candidates = self._candidates
        best, most = candidates.best_options(candidates.option_values - price * candidates.option_costs)
        # A class takes nothing as the members that it takes none of.
        return np.where(most > np.maximum(0, surplus), best, MEMBERS), ends

    def cost(self, modes: np.ndarray, ends: np.ndarray) -> int:
        """What that costs together."""
        chosen = modes != MEMBERS
        of_members = (self._costs[ends] - self._costs[self._first])[~chosen]
        return int(of_members.sum()) + int(self._candidates.option_costs[modes[chosen]].sum())

    def _ends(self, price: float) -> np.ndarray:
        """A binary search in every class's members at once."""
        low, high = self._first, self._end
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (low + high) // 2
            open_ = low < high
            above = open_ & (self._density[np.where(open_, middle, 0)] > price)
            low, high = np.where(above, middle + 1, low), np.where(open_ & ~above, middle, high)
        return low


def _least_price(demand: _Demand, budget: int) -> float:
    """The least price at which what is taken fits the budget, to the last bit."""
    if demand.cost(*demand.at(0.0)) <= budget:
        return 0.0
    # Positive floats are in the order of their bits: halving these finds the magnitude as fast as the digits.
    low, high = 0, _bits(demand.highest_price())
    while high - low > 1:
        middle = (low + high) // 2
        if demand.cost(*demand.at(_price(middle))) <= budget:
            high = middle
        else:
            low = middle
    return _price(high)


def _bits(price: float) -> int:
    return int(np.float64(price).view(np.int64))


def _price(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
