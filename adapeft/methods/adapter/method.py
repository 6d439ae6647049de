"""Adapter: bottlenecks after the sublayers of the blocks."""

from __future__ import annotations

from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.adapter.options import AdapterOptions
from adapeft.methods.base.method import Plan, UnmeasuredMethod
from adapeft.model.structure import ParameterInfo
from adapeft.parts.adapter import Adapter
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset

_SUBLAYERS = {"pfeiffer": ("feed-forward",), "houlsby": ("feed-forward", "attention")}


class Adapters(UnmeasuredMethod[AdapterOptions]):
    """A bottleneck after each feed-forward network, all of the largest size that the budget allows.

    Pfeiffer et al., "AdapterFusion", EACL 2021; with ``select.placement: houlsby`` also after each attention, as in
    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019. ``select.include`` and
    ``select.exclude`` match the weights of the output projections that the adapters follow.
    """

    options = AdapterOptions
    family = "rule"
    summary = "bottlenecks after the blocks' feed-forward networks"
    adds_parameters = True
    source = "Houlsby et al. 2019"

    def check(self, groups: Groups, budget: int, settings: AdapterOptions) -> None:
        places = _places(groups, settings)
        if not places:
            sublayers = " or ".join(_SUBLAYERS[settings.placement])
            raise AdapeftError(
                f"select.method = adapter: no candidate is the output projection of {sublayers}. Admit one in "
                f"select.include and select.exclude; mixtures of experts have none."
            )
        least = _count(places, 1)
        if least > budget:
            raise AdapeftError(
                f"select.budget is {budget:,} parameters, but {len(places)} adapters with a bottleneck of 1 have "
                f"{least:,}. Raise the budget to {least}, or narrow select.include to some layers."
            )

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[AdapterOptions], ranks: Ranks) -> Subset:
        places = _places(groups, plan.settings)
        constant, per_unit = _count(places, 0), _count(places, 1) - _count(places, 0)
        bottleneck = (plan.budget - constant) // per_unit
        parts = {info.name.removesuffix(".weight"): Adapter((_width(info),), bottleneck) for info in places}
        return Subset(parts).described(status="rule", rank=bottleneck, num_groups=len(places), num_chosen=len(places))


def _places(groups: Groups, settings: AdapterOptions) -> list[ParameterInfo]:
    return [info for info in groups.parameters if info.output_of in _SUBLAYERS[settings.placement]]


def _width(info: ParameterInfo) -> int:
    return info.shape[info.output_dim or 0]


def _count(places: list[ParameterInfo], bottleneck: int) -> int:
    """Return the number of elements of adapters at all ``places``: two matrices and two biases each."""
    return sum(bottleneck * (2 * _width(info) + 1) + _width(info) for info in places)
