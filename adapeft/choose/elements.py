"""Elements under a budget. Their costs are equal, so the best subset is the exact global top-k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from adapeft.choose.draw import draw_elements
from adapeft.choose.scores import Scores
from adapeft.choose.topk import top_k
from adapeft.errors import AdapeftError
from adapeft.finite import is_finite
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import ElementShard, Value
from adapeft.parts.elements import Elements
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset


def choose_elements(
    groups: Groups,
    elements: Sequence[ElementShard],
    value: Value,
    budget: int,
    ranks: Ranks,
    *,
    by_tensor: bool = False,
) -> Subset:
    """Return the ``budget`` elements of largest value over all ranks, the optimum for equal costs. Collective.

    Every rank returns the same subset; ranks exchange chosen indices, never values.

    Args:
        by_tensor: whether each tensor gets a share of the budget in proportion to its size, and its own top-k.

    Raises:
        AdapeftError: a value is not finite, so the values have no order.
    """
    values = Scores(elements, value)
    overflown = torch.tensor([sum(not is_finite(scores) for scores in values)])
    if int(ranks.all_reduce(overflown)):
        raise AdapeftError(
            "the values of single elements are not finite: their statistics or select.reach are too large for float32. "
            "Lower select.reach, and check the scale of the targets."
        )
    positions = positions_of(groups, elements)
    if by_tensor:
        local = _top_k_by_tensor(groups, elements, value, budget, ranks)
    else:
        local = top_k(values, positions, budget, ranks.all_reduce)
    total = torch.zeros(1, dtype=torch.float64)
    for scores, picks in zip(values, local, strict=True):
        total += scores[picks].sum(dtype=torch.float64).cpu()
    value_sum = float(ranks.all_reduce(total))
    return subset_at(groups, gathered_positions(local, positions, ranks)).described(
        value=value_sum, bound=value_sum, gap=0.0, status="optimal"
    )


def positions_of(groups: Groups, elements: Sequence[ElementShard]) -> list[int]:
    """Return the start position of each shard among the elements of all candidates."""
    starts = groups.starts
    return [int(starts[shard.slice.parameter]) + shard.slice.start for shard in elements]


def gathered_positions(picks: Sequence[Tensor], positions: Sequence[int], ranks: Ranks) -> np.ndarray:
    """Return the positions of all ranks' picks among the elements of all candidates, int64. Collective.

    Args:
        picks: chosen indices into each of this rank's shards.
        positions: start positions of the shards, from ``positions_of``.
    """
    mine = [(pick + position).cpu() for pick, position in zip(picks, positions, strict=True)]
    return torch.cat(ranks.all_gather(torch.cat([torch.empty(0, dtype=torch.int64), *mine]))).numpy()


def filled_by_draw(groups: Groups, subset: Subset, seed: int) -> Subset:
    """Return a choice of single elements with a uniform draw of others for what it left of the budget.

    The draw is that of the random method with the same seed, without the elements that were chosen: where rounding
    chooses one element more or less, one drawn element changes. An empty choice stays empty: ``select.if_empty``
    decides about it.

    Args:
        groups: the candidates.
        subset: the choice; its ``unspent`` elements are drawn.
        seed: random seed of the draw.
    """
    rest = subset.choice.unspent
    if not rest or not subset.parts:
        return subset
    chosen = _positions(groups, subset)
    drawn = draw_elements(groups, len(chosen) + rest, seed)
    others = drawn[~np.isin(drawn, chosen)][:rest]
    parts = subset_at(groups, np.concatenate([chosen, others])).parts
    return replace(subset, parts=parts).described(num_drawn=rest, unspent=0)


def without_draw(groups: Groups, subset: Subset) -> Subset | None:
    """Return the choice that ``filled_by_draw`` has filled, from the filled one.

    The draw is repeated with its seed. Of the elements that it begins with, it does not tell which were also chosen:
    as many of those that it draws next count as chosen instead. Filled again, the result is the same subset.

    Args:
        groups: the candidates of the choice.
        subset: a choice of single elements, filled or not.

    Returns:
        None if the subset holds anything else than a choice from ``groups`` and the draw of its seed.
    """
    rest = subset.choice.num_drawn
    if not rest:
        return subset
    sizes = {info.name: info.shape for info in groups.parameters}
    is_of_groups = all(
        isinstance(part, Elements) and sizes.get(name) == part.shape for name, part in subset.parts.items()
    )
    if not is_of_groups or subset.choice.num_chosen != subset.count - rest:
        return None
    trained = _positions(groups, subset)
    drawn = draw_elements(groups, len(trained), subset.choice.seed)[:rest]
    if not np.isin(drawn, trained).all():
        return None
    parts = subset_at(groups, np.setdiff1d(trained, drawn)).parts
    return replace(subset, parts=parts).described(num_drawn=None, unspent=rest)


def _positions(groups: Groups, subset: Subset) -> np.ndarray:
    """Return the positions of a subset's elements among those of all candidates, int64."""
    places = {info.name: start for info, start in zip(groups.parameters, groups.starts[:-1].tolist(), strict=True)}
    found = [part.mask().nonzero().squeeze(1).numpy() + places[name] for name, part in subset.parts.items()]
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def subset_at(groups: Groups, positions: np.ndarray) -> Subset:
    """Return the subset of the elements at ``positions`` among those of all candidates: int64, unique, in any order."""
    chosen, starts = np.sort(positions), groups.starts
    cuts = np.searchsorted(chosen, starts)
    parts = {
        info.name: groups.part(index, torch.from_numpy(chosen[cuts[index] : cuts[index + 1]] - starts[index]))
        for index, info in enumerate(groups.parameters)
        if cuts[index + 1] > cuts[index]
    }
    return Subset(parts).described(num_groups=int(starts[-1]), num_chosen=len(chosen))


def shares(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Divide ``budget`` exactly in proportion to ``sizes`` [P], by largest remainders; returns int64 [P]."""
    total = int(sizes.sum())
    whole, remainders = zip(*(divmod(budget * size, total) for size in sizes.tolist()), strict=True)
    largest_first = np.argsort([-remainder for remainder in remainders], kind="stable")
    share = np.array(whole, dtype=np.int64)
    share[largest_first[: budget - int(share.sum())]] += 1
    return share


def _top_k_by_tensor(
    groups: Groups, elements: Sequence[ElementShard], value: Value, budget: int, ranks: Ranks
) -> list[Tensor]:
    """Choose the top-k of each tensor's share of the budget, tensor by tensor in the same order on every rank."""
    sizes = np.array([info.count for info in groups.parameters], dtype=np.int64)
    local: dict[int, Tensor] = {}
    for parameter, share in enumerate(shares(sizes, budget).tolist()):
        mine = [index for index, shard in enumerate(elements) if shard.slice.parameter == parameter]
        own = [elements[index] for index in mine]
        picks = top_k(Scores(own, value), [shard.slice.start for shard in own], share, ranks.all_reduce)
        local |= dict(zip(mine, picks, strict=True))
    return [local[index] for index in range(len(elements))]
