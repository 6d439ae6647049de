"""LoRA: low-rank products beside the linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapeft.choose.subset import Part
from adapeft.inputs.structure import ParameterInfo
from adapeft.measure.groups import Groups
from adapeft.methods.rank_method import RankMethod

if TYPE_CHECKING:
    from adapeft.config import Select


class LoRA(RankMethod):
    """LoRA of one rank on every linear layer of the blocks, by peft; ``select.include`` narrows it.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. alpha is the rank, the ratio of PEFT's
    defaults, so that the product is not scaled; the learning rate is there for that.
    """

    name = "lora"
    family = "rule"
    summary = "low-rank products beside every linear layer of the blocks"
    source = "Hu et al. 2022"
    what = "rank"

    def places(self, groups: Groups, settings: Select) -> Sequence[ParameterInfo]:
        return [info for info in groups.parameters if info.is_linear and info.layer >= 0]

    def part(self, weight: ParameterInfo, rank: int) -> Part:
        assert weight.output_dim is not None
        return Part("lora", weight.shape, dim=weight.output_dim, rank=rank, alpha=float(rank))
