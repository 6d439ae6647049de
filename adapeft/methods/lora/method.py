"""LoRA: low-rank updates of every linear layer of the blocks."""

from __future__ import annotations

from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import Plan, UnmeasuredMethod
from adapeft.methods.lora.options import LoRAOptions
from adapeft.model.structure import ParameterInfo
from adapeft.parts.lora import Lora
from adapeft.parts.part import Part
from adapeft.ranks import Ranks
from adapeft.servers import MAX_RANK
from adapeft.subset.subset import Subset


class LoRA(UnmeasuredMethod[LoRAOptions]):
    """W + (alpha / r) · B A on the linear layers of the blocks, all with the largest rank r that the budget allows.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, on all linear layers as in PEFT's
    "all-linear"; alpha = r, the ratio of PEFT's defaults. ``select.include`` and ``select.exclude`` restrict the
    layers. The rank of a matrix is at most its smaller dimension.
    """

    options = LoRAOptions
    family = "rule"
    summary = "low-rank updates of the blocks' linear layers"
    adds_parameters = True
    source = "Hu et al. 2022"

    def check(self, groups: Groups, budget: int, settings: LoRAOptions) -> None:
        matrices = _matrices(groups)
        if not matrices:
            raise AdapeftError(
                "select.method = lora: no candidate is a linear layer of a block. "
                + (
                    f"{len(groups.left_out)} parameters such as {groups.left_out[0]!r} are packed, so no delta can be "
                    "added to them. Load the model without quantization."
                    if groups.left_out
                    else "Admit linear layers in select.include and select.exclude."
                )
            )
        least = _count(matrices, 1)
        if least > budget:
            raise AdapeftError(
                f"select.budget is {budget:,} parameters, but LoRA of rank 1 on {len(matrices)} layers trains "
                f"{least:,}. Raise the budget to {least}, or narrow select.include to some layers."
            )

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[LoRAOptions], ranks: Ranks) -> Subset:
        matrices = _matrices(groups)
        rank, largest = 1, max(min(info.shape) for info in matrices)
        if plan.settings.servable:
            largest = min(largest, MAX_RANK)
        while rank < largest and _count(matrices, rank + 1) <= plan.budget:
            rank += 1
        parts: dict[str, Part] = {}
        for info in matrices:
            own = min(rank, *info.shape)
            parts[info.name] = Lora(info.shape, info.output_dim or 0, own, float(own))
        return Subset(parts).described(status="rule", rank=rank, num_groups=len(matrices), num_chosen=len(matrices))


def least_lora(groups: Groups) -> int | None:
    """Return the number of elements of LoRA of rank 1 on the linear layers of the blocks; None if there are none."""
    return _count(_matrices(groups), 1) or None


def _matrices(groups: Groups) -> list[ParameterInfo]:
    return [info for info in groups.parameters if info.is_linear and info.layer >= 0]


def _count(matrices: list[ParameterInfo], rank: int) -> int:
    """Return the number of elements of LoRA of ``rank`` on all ``matrices``."""
    return sum(min(rank, *info.shape) * sum(info.shape) for info in matrices)
