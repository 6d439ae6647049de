"""Adapter: bottlenecks after the sublayers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapeft.choose.subset import Part
from adapeft.inputs.structure import ParameterInfo
from adapeft.inputs.sublayers import sublayer_outputs
from adapeft.measure.groups import Groups
from adapeft.methods.rank_method import RankMethod

if TYPE_CHECKING:
    from adapeft.config import Select


class Adapter(RankMethod):
    """A bottleneck with a residual after every feed-forward; ``select.placement: houlsby`` adds those after attention.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019; Pfeiffer et al., "AdapterFusion:
    Non-Destructive Task Composition for Transfer Learning", EACL 2021, have it after the feed-forward alone.
    """

    name = "adapter"
    family = "rule"
    summary = "bottlenecks after every feed-forward, or after attention too"
    source = "Houlsby et al. 2019, Pfeiffer et al. 2021"
    what = "bottleneck size"

    def places(self, groups: Groups, settings: Select) -> Sequence[ParameterInfo]:
        return [
            weight
            for attention, feed_forward in sublayer_outputs(groups.parameters)
            for weight in ((attention, feed_forward) if settings.placement == "houlsby" else (feed_forward,))
        ]

    def part(self, weight: ParameterInfo, rank: int) -> Part:
        assert weight.output_dim is not None
        return Part("adapter", weight.shape, dim=weight.output_dim, rank=rank)
