"""Elements under a budget. Their costs are equal, so the best subset is the exact global top-k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from adapeft.choose.scores import Scores
from adapeft.choose.topk import top_k
from adapeft.errors import AdapeftError
from adapeft.finite import is_finite
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import ElementShard, Value
from adapeft.parts.elements import Elements
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset

_BLOCK = 4096
"""Number of drawn elements that are compared at once."""


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


def draw_others(chosen: np.ndarray, total: int, count: int, draw: np.random.Generator) -> np.ndarray:
    """Draw ``count`` of the elements 0 … ``total`` that are not ``chosen`` uniformly; returns their positions, int64.

    Args:
        chosen: positions of elements, unique, in any order.
        total: number of elements.
        count: number of elements to draw.
        draw: source of randomness.
    """
    drawn = _drawn(total - len(chosen), count, draw)
    # The j-th chosen element moves every draw from position chosen[j] - j on by one.
    ordered = np.sort(chosen)
    return drawn + np.searchsorted(ordered - np.arange(len(ordered)), drawn, side="right")


def filled_by_draw(groups: Groups, subset: Subset, seed: int) -> Subset:
    """Return a choice of single elements with a uniform draw of others for what it left of the budget.

    An empty choice stays empty: ``select.if_empty`` decides about it.

    Args:
        groups: the candidates.
        subset: the choice; its ``unspent`` elements are drawn.
        seed: random seed of the draw.
    """
    rest = subset.choice.unspent
    if not rest or not subset.parts:
        return subset
    chosen = _positions(groups, subset)
    drawn = draw_others(chosen, int(groups.starts[-1]), rest, _filling(seed))
    parts = subset_at(groups, np.concatenate([chosen, drawn])).parts
    return replace(subset, parts=parts).described(num_drawn=rest, unspent=0)


def without_draw(groups: Groups, subset: Subset) -> Subset | None:
    """Return the choice that ``filled_by_draw`` has filled, from the filled one.

    The draw is repeated with its seed. It does not tell which of two trained neighbors was chosen if only one was; the
    second one counts as chosen then. Filled again, the result is the same subset in any case.

    Args:
        groups: the candidates of the choice.
        subset: a choice of single elements, filled or not.

    Returns:
        None if the subset holds anything else than a choice from ``groups`` and the draw of its seed.
    """
    rest = subset.choice.num_drawn
    if not rest:
        return subset
    num_chosen, total = subset.count - rest, int(groups.starts[-1])
    sizes = {info.name: info.shape for info in groups.parameters}
    is_of_groups = all(
        isinstance(part, Elements) and sizes.get(name) == part.shape for name, part in subset.parts.items()
    )
    if num_chosen < 0 or rest > total - num_chosen or not is_of_groups:
        return None
    trained = np.sort(_positions(groups, subset))
    drawn = np.sort(_drawn(total - num_chosen, rest, _filling(subset.choice.seed)))
    chosen: list[int] = []
    done = 0
    while done < len(trained) and len(chosen) <= num_chosen:
        # After j chosen elements, a draw is j positions beyond its place among the others.
        ahead = drawn[done - len(chosen) :][:_BLOCK]
        is_drawn = trained[done : done + len(ahead)] - len(chosen) == ahead
        if len(ahead) and is_drawn.all():
            done += len(ahead)
        else:
            done += int(is_drawn.argmin()) if len(ahead) else 0
            chosen.append(int(trained[done]))
            done += 1
    if len(chosen) != num_chosen:
        return None
    parts = subset_at(groups, np.array(chosen, dtype=np.int64)).parts
    return replace(subset, parts=parts).described(num_drawn=None, unspent=rest)


def _drawn(total: int, count: int, draw: np.random.Generator) -> np.ndarray:
    return draw.choice(total, count, replace=False, shuffle=False)


def _filling(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, 2])


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
