"""Elements under a budget: their costs are equal, so the best subset is the exact global top-k."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from adapeft.choose.subset import Part, Subset
from adapeft.choose.topk import top_k
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import ElementShard
from adapeft.ranks import Ranks

Value = Callable[[dict[str, Tensor]], Tensor]
"""Columns of statistics → the value of each element, of the same shape."""


def choose_elements(
    groups: Groups, elements: Sequence[ElementShard], value: Value, budget: int, ranks: Ranks
) -> Subset:
    """The ``budget`` elements of largest value over all ranks; optimal, since their costs are equal. Collective.

    Every rank returns the same subset; only chosen indices travel, never values.
    """
    starts = np.concatenate([[0], np.cumsum([info.count for info in groups.parameters])])
    values = [value(shard.columns) for shard in elements]
    positions = [int(starts[shard.slice.parameter]) + shard.slice.start for shard in elements]
    local = top_k(values, positions, budget, ranks.all_reduce)
    total = torch.zeros(1, dtype=torch.float64)
    mine = [torch.empty(0, dtype=torch.int64)]
    for scores, picks, position in zip(values, local, positions, strict=True):
        total += scores[picks].sum(dtype=torch.float64).cpu()
        mine.append((picks + position).cpu())
    chosen = torch.cat(ranks.all_gather(torch.cat(mine))).sort().values
    value_sum = float(ranks.all_reduce(total))
    parts = {}
    for index, info in enumerate(groups.parameters):
        low, high = np.searchsorted(chosen.numpy(), starts[index : index + 2])
        if high > low:
            parts[info.name] = Part("elements", info.shape, chosen[low:high] - int(starts[index]))
    return Subset(parts).described(
        value=value_sum,
        bound=value_sum,
        gap=0.0,
        status="optimal",
        num_groups=int(starts[-1]),
        num_chosen=len(chosen),
    )
