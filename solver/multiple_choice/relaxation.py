"""The Lagrangian relaxation of the multiple-choice knapsack: an upper bound, and penalties of decisions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solver.multiple_choice.problem import MultipleChoiceProblem

# Mode of a class that takes members instead of an option, possibly none of them.
MEMBERS = -1


@dataclass(frozen=True)
class Candidates:
    """The eligible items of a problem by class; items without a class are the members of a class without options.

    Members are sorted by class, then by descending density, ties by position. The best use of a budget for the members
    of a class, if the last one may be fractional, is thus a prefix of its list. Options are sorted by class, then by
    cost.

    Attributes:
        num_classes: C, the number of classes with an eligible item.
        budget: Budget rounded down to a multiple of the costs' greatest common divisor, as the rest cannot be spent.
        members: Position of each member in the problem. int64 ``[M]``.
        member_values: Values of the members. float64 ``[M]``.
        member_costs: Costs of the members. int64 ``[M]``.
        member_classes: Classes of the members, from 0 to C - 1, ascending. int64 ``[M]``.
        options: Position of each option in the problem. int64 ``[O]``.
        option_values: Values of the options. float64 ``[O]``.
        option_costs: Costs of the options. int64 ``[O]``.
        option_classes: Classes of the options, ascending. int64 ``[O]``.
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
        # A stable sort breaks ties by position on any machine.
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
        """Sum ``numbers`` ``[M]`` over the members of each class, ``[C]`` of the same type; 0 without members."""
        sums = np.zeros(self.num_classes, dtype=numbers.dtype)
        starts = np.flatnonzero(np.diff(self.member_classes, prepend=-1))
        if starts.size:
            sums[self.member_classes[starts]] = np.add.reduceat(numbers, starts)
        return sums

    def best_options(self, surplus: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the option of the largest ``surplus`` (float64 ``[O]``) in each class, ties by cost.

        Returns:
            The options (int64 ``[C]``, `MEMBERS` for classes without options) and their surplus (``[C]``, then -inf).
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
        """Return a choice as a mask by the problem's positions, bool ``[N]``.

        Args:
            modes: Option of each class, or `MEMBERS`. int64 ``[C]``.
            taken: True for members to take if the mode is `MEMBERS`. bool ``[M]``.
            num_items: N.
        """
        chosen = np.zeros(num_items, dtype=bool)
        chosen[self.options[modes[modes != MEMBERS]]] = True
        chosen[self.members[taken & (modes[self.member_classes] == MEMBERS)]] = True
        return chosen


@dataclass(frozen=True)
class ChoiceRelaxation:
    r"""The Lagrangian relaxation of the budget constraint, at the price λ that gives the lowest bound.

    At a price of λ per unit of budget, each class takes either all members worth more than their price or one option,
    whichever has the larger surplus:

    .. math::
        U(\lambda) = \lambda B + \sum_k s_k, \quad
        s_k = \max\Big(\sum_{m \in M_k} \max(0, v_m - \lambda c_m), \; \max_{o \in O_k} v_o - \lambda c_o\Big)

    which bounds the optimum for any λ ≥ 0. Its minimum equals the bound of the linear relaxation, because the
    constraints of a class alone describe the convex hull of its permitted choices (they are the clique inequalities of
    a perfect graph): the convex hulls of the classes are merged by slope until the budget breaks one (Sinha and
    Zoltners, *The multiple-choice knapsack problem*, 1979). The cost of a class decreases with the price, so the price
    is found by bisection, without building hulls.

    A decision against the relaxation costs at least its penalty, the surplus that is lost: a choice that contains it is
    worth at most U minus the penalty.

    Attributes:
        candidates: Items to choose from.
        price: λ, the least price at which the choice fits the budget; 0 if all items fit.
        modes: Option that each class takes at that price, or `MEMBERS`. int64 ``[C]``.
        taken: True for members worth more than their price, which are taken if the mode is `MEMBERS`. bool ``[M]``.
        room: Budget that the choice leaves.
        bound: U.
        mode_penalties: Penalty of using the members of a class. float64 ``[C]``.
        option_penalties: Penalty of taking an option. float64 ``[O]``.
        member_penalties: Penalty of using the members of a class and deciding this member against the relaxation.
            float64 ``[M]``.
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
        """Solve the relaxation of a problem.

        It takes one sort, then about 60 prices, each with one look-up per class and one pass over the options.
        """
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
        # Rounding of the price may flip the sign for a member that is worth exactly its price.
        against = np.maximum(0, np.where(taken, member_surplus, -member_surplus))
        return cls(
            candidates=candidates,
            price=price,
            modes=modes,
            taken=taken,
            room=candidates.budget - demand.cost(modes, ends),
            # At a price of 0 the budget does not matter, and it may exceed float64.
            bound=(price * candidates.budget if price else 0.0) + float(surplus.sum()),
            mode_penalties=mode_penalties,
            option_penalties=surplus[candidates.option_classes] - option_surplus,
            member_penalties=mode_penalties[candidates.member_classes] + against,
        )


class _Demand:
    """Choices of the classes at a price."""

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._density = candidates.member_values / candidates.member_costs
        self._first = np.searchsorted(candidates.member_classes, np.arange(candidates.num_classes))
        self._end = np.searchsorted(candidates.member_classes, np.arange(candidates.num_classes), side="right")
        self._values = np.append(0.0, np.cumsum(candidates.member_values))
        self._costs = np.append(0, np.cumsum(candidates.member_costs))

    def highest_price(self) -> float:
        """Return a price at which nothing is taken."""
        options = self._candidates.option_values / self._candidates.option_costs
        return 2 * max(float(self._density.max(initial=0.0)), float(options.max(initial=0.0)))

    def at(self, price: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the mode of each class and the end of its members worth more than their price, both int64 ``[C]``."""
        ends = self._ends(price)
        values = self._values[ends] - self._values[self._first]
        surplus = values - price * (self._costs[ends] - self._costs[self._first])
        candidates = self._candidates
        best, most = candidates.best_options(candidates.option_values - price * candidates.option_costs)
        # A class that takes nothing has the mode MEMBERS, with no members taken.
        return np.where(most > np.maximum(0, surplus), best, MEMBERS), ends

    def cost(self, modes: np.ndarray, ends: np.ndarray) -> int:
        """Return the total cost of the choices."""
        chosen = modes != MEMBERS
        of_members = (self._costs[ends] - self._costs[self._first])[~chosen]
        return int(of_members.sum()) + int(self._candidates.option_costs[modes[chosen]].sum())

    def _ends(self, price: float) -> np.ndarray:
        """Return the ends of members denser than ``price``, by a binary search in all classes at once."""
        low, high = self._first, self._end
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (low + high) // 2
            open_ = low < high
            above = open_ & (self._density[np.where(open_, middle, 0)] > price)
            low, high = np.where(above, middle + 1, low), np.where(open_ & ~above, middle, high)
        return low


def _least_price(demand: _Demand, budget: int) -> float:
    """Return the least price, exact to the last bit, at which the choices fit the budget."""
    if demand.cost(*demand.at(0.0)) <= budget:
        return 0.0
    # Positive floats have the order of their bits, so bisecting bits finds the exponent as fast as the digits.
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
