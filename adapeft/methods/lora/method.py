"""LoRA: low-rank updates of the linear layers of the blocks."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np

from adapeft.choose.draw import fitting
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

_QUERY_OR_KEY = re.compile(r"(^|[._])(q|k|wq|wk|query|key)(_proj|_lin|_a_proj|_b_proj)?\.weight$")
"""Roles of the matrices of queries and of keys alone, as transformers names them."""
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


class LoRA(UnmeasuredMethod[LoRAOptions]):
    """W + (alpha / r) · B A on the linear layers of the blocks, all with the largest rank r that the budget allows.

    A budget below rank 1 on all layers trains rank 1 on a draw of them, even over the depth.

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
        least = min(lora_counts(groups))
        if least > budget:
            raise AdapeftError(
                f"select.budget is {budget:,} parameters, but LoRA of rank 1 on the smallest layer trains {least:,}. "
                f"Raise the budget to {least}, or choose another method."
            )

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[LoRAOptions], ranks: Ranks) -> Subset:
        candidates = _matrices(groups)
        matrices = _drawn(candidates, plan.budget, plan.seed)
        rank, largest = 1, max(min(info.shape) for info in matrices)
        if plan.settings.servable:
            largest = min(largest, MAX_RANK)
        while rank < largest and _count(matrices, rank + 1) <= plan.budget:
            rank += 1
        parts: dict[str, Part] = {}
        for info in matrices:
            own = min(rank, *info.shape)
            parts[info.name] = Lora(info.shape, info.output_dim or 0, own, float(own))
        status = "rule" if len(matrices) == len(candidates) else "drawn"
        return Subset(parts).described(status=status, rank=rank, num_groups=len(candidates), num_chosen=len(matrices))


def lora_counts(groups: Groups) -> list[int]:
    """Return the number of elements of LoRA of rank 1 on each of the linear layers of the blocks."""
    return [_count([info], 1) for info in _matrices(groups)]


def least_lora(groups: Groups) -> int | None:
    """Return the smallest budget at which LoRA is advised for a language model; None without linear layers in blocks.

    On SmolLM2 LoRA has lower losses than single elements from 0.01 % of the parameters on, the least that was tried:
    rank 1 on 10 of 210 layers, a 23rd of LoRA on all of them (tests/benchmarks/results/nl2bash.md).
    """
    counts = lora_counts(groups)
    return max(min(counts), math.ceil(sum(counts) / 25)) if counts else None


def _matrices(groups: Groups) -> list[ParameterInfo]:
    return [info for info in groups.parameters if info.is_linear and info.layer >= 0]


def _drawn(matrices: list[ParameterInfo], budget: int, seed: int) -> list[ParameterInfo]:
    """Return a draw of the matrices whose LoRA of rank 1 fits into the budget; all, if they fit.

    A draw has lower losses than the layers that a knapsack of their separate influences chooses: those of one depth
    push the outputs alike (tests/benchmarks/results/nl2bash.md).
    """
    order = _order(matrices, np.random.default_rng([seed, 2]))
    mask = fitting(order, np.array([_count([info], 1) for info in matrices]), budget)
    return [info for info, is_drawn in zip(matrices, mask, strict=True) if is_drawn]


def _order(matrices: list[ParameterInfo], random: np.random.Generator) -> np.ndarray:
    """Return a random order of the matrices, even over the blocks, in which those of queries and keys are last.

    Alone, queries and keys gain least from LoRA (Hu et al. 2022, table 5). On nl2bash with SmolLM2 this order is ahead
    of a uniform one on each of three seeds at 0.1 %, and its draws of eight layers are closer together at 0.01 %.
    """
    blocks = np.array([info.layer for info in matrices])
    is_late = np.array([_QUERY_OR_KEY.search(info.role) is not None for info in matrices])
    # First one matrix of each block, then another one of each, ….
    shuffled = np.lexsort((random.random(len(matrices)), is_late, blocks))
    sharing = 2 * blocks[shuffled] + is_late[shuffled]
    turns = np.empty_like(blocks)
    turns[shuffled] = np.arange(len(sharing)) - np.searchsorted(sharing, sharing)
    # A lattice: every block is as likely as any other, and the first ones, whatever their number, are evenly spaced.
    depth = int(blocks.max()) + 1
    stride = next(n for n in itertools.count(round(depth / _GOLDEN_RATIO)) if math.gcd(n, depth) == 1)
    places = (random.integers(depth) + stride * blocks) % depth
    return np.lexsort((places, turns, is_late))


def _count(matrices: list[ParameterInfo], rank: int) -> int:
    """Return the number of elements of LoRA of ``rank`` on all ``matrices``."""
    return sum(min(rank, *info.shape) * sum(info.shape) for info in matrices)
