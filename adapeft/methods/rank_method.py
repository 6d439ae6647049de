"""Methods that put the same small matrices beside many weights, as large as the budget allows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapeft.choose.subset import Part, Subset
from adapeft.errors import AdapeftError
from adapeft.inputs.structure import ParameterInfo
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.method import Method, Plan
from adapeft.ranks import Ranks

if TYPE_CHECKING:
    from adapeft.config import Select


class RankMethod(Method):
    """A method whose one number is a rank, or a bottleneck's size, which is the largest that the budget allows."""

    cost = "nothing"
    what: str
    """The number's name, for messages."""

    @abstractmethod
    def places(self, groups: Groups, settings: Select) -> Sequence[ParameterInfo]:
        """The weights that get something beside them."""

    @abstractmethod
    def part(self, weight: ParameterInfo, rank: int) -> Part:
        """What ``weight`` gets."""

    def check(self, groups: Groups, budget: int, settings: Select) -> None:
        places = self.places(groups, settings)
        if not places:
            raise AdapeftError(
                f"select.method = {self.name}: no linear layer inside the model's blocks is among what may be chosen. "
                f"Widen select.include and select.exclude."
            )
        least = self._count(places, 1)
        if least > budget:
            raise AdapeftError(
                f"select.budget is {budget:,} parameters, and {self.name} of {self.what} 1 beside {len(places)} "
                f"weights trains {least:,}. Raise the budget to {least}, or narrow select.include."
            )

    def measure(self, passes: Passes, groups: Groups, settings: Select) -> Statistics:
        return Statistics(groups, {})

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan, ranks: Ranks) -> Subset:
        places = self.places(groups, plan.settings)
        least = self._count(places, 1)
        each = self._count(places, 2) - least
        most = min(min(weight.shape) for weight in places)
        rank = min(1 + (plan.budget - least) // each, most)
        return Subset({weight.name: self.part(weight, rank) for weight in places}).described(
            status="rule", rank=rank, num_groups=groups.num_groups, num_chosen=len(places)
        )

    def _count(self, places: Sequence[ParameterInfo], rank: int) -> int:
        return sum(self.part(weight, rank).count for weight in places)
