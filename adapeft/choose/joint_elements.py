"""Single elements by a lower bound of their joint influence, from the upper bound of their joint curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapeft.choose.elements import gathered_positions, positions_of, subset_at
from adapeft.choose.fewest import ENOUGH
from adapeft.choose.scores import Scores
from adapeft.choose.topk import top_k
from adapeft.measure.groups import Groups
from adapeft.measure.influence import influence
from adapeft.measure.statistics import ElementShard
from adapeft.parts.part import mask_of
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset

_GAP = 1e-4
_HALVINGS = 40
_PRICES = 41


@dataclass(frozen=True)
class _Candidate:
    """The elements chosen at a price λ of √A.

    Attributes:
        picks: indices of this rank's picks, by shard.
        slope: Σb of the picks on all ranks.
        root: Σ√A of the picks on all ranks.
    """

    picks: list[Tensor]
    slope: float
    root: float

    def value(self, reach: float) -> float:
        slope, curvature = torch.tensor([self.slope, self.root**2], dtype=torch.float64)
        return float(influence(slope, curvature, reach))

    def bound(self, reach: float, price: float) -> float:
        return reach * (self.slope - price * self.root) + 0.5 * price * price


def choose_elements_jointly(
    groups: Groups,
    elements: Sequence[ElementShard],
    budget: int,
    reach: float,
    ranks: Ranks,
) -> Subset:
    r"""Choose at most ``budget`` elements of largest joint influence, the same on every rank. Collective.

    Elements trained together take one step η ≤ τ, and their joint curvature is at most :math:`(\sum_S\sqrt{A})^2`, by
    the Cauchy-Schwarz inequality in the metric of the Fisher matrix. Thousands of the steepest elements come close to
    this, because they change the output alike (tests/benchmarks/results/stsb.md). Their joint influence is at least

    .. math:: G(S) = \max_{\eta \le \tau} \eta \sum_S b - \tfrac12 \eta^2 \Big(\sum_S \sqrt{A}\Big)^2.

    Since :math:`\tfrac12\eta^2C^2 \ge \lambda\eta C - \tfrac12\lambda^2`, every price λ of √A gives a bound for all S:

    .. math:: G(S) \le \tau \sum_{\text{top } k} \big(b - \lambda\sqrt{A}\big)_+ + \tfrac12\lambda^2.

    The bound is convex in λ. At its minimum, :math:`\lambda = \tau\sum_S\sqrt A` for the elements S in its sum, and
    these attain it up to the contribution of one element. Bisection finds them. Part of the budget may stay unspent,
    where more elements would add more curvature than slope. The description has ``value`` G, ``bound``, ``gap`` and
    ``unspent``, the number of elements that were left.

    Args:
        groups: the candidates.
        elements: this rank's shards of their statistics.
        budget: number of elements.
        reach: reach τ of the planned training.
        ranks: ranks that hold the statistics.
    """
    slopes, roots = Scores(elements, _slope), Scores(elements, _root)
    positions = positions_of(groups, elements)

    def at(price: float) -> _Candidate:
        scores = Scores(elements, lambda columns: _slope(columns) - price * _root(columns))
        picks = top_k(scores, positions, budget, ranks.all_reduce)
        sums = [torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
        for total, values in zip(sums, (slopes, roots), strict=True):
            for value, mine in zip(values, picks, strict=True):
                total += value[mine].sum(dtype=torch.float64).cpu()
        return _Candidate(picks, *ranks.all_reduce(torch.cat(sums)).tolist())

    best = at(0.0)
    bound = best.bound(reach, 0.0)
    low, high = 0.0, reach * best.root  # root decreases as its price increases
    for _ in range(_HALVINGS):
        if best.value(reach) >= bound * (1 - _GAP):
            break
        price = (low + high) / 2
        found = at(price)
        bound = min(bound, found.bound(reach, price))
        best = max(best, found, key=lambda candidate: candidate.value(reach))
        low, high = (price, high) if price < reach * found.root else (low, price)
    value = best.value(reach)
    gap = max(0.0, 1 - value / bound) if bound else 0.0
    chosen = gathered_positions(best.picks, positions, ranks)
    return subset_at(groups, chosen).described(
        unspent=budget - len(chosen),
        value=value,
        bound=bound,
        gap=gap,
        status="within_gap" if gap <= _GAP else "feasible",
    )


def choose_fewest_jointly(
    groups: Groups, elements: Sequence[ElementShard], best: Subset, reach: float, ranks: Ranks
) -> Subset:
    """Return the joint choice of the fewest elements that have ``ENOUGH`` of the value of ``best``. Collective.

    How many that are is found among the elements of ``best`` and as many steepest ones, whose prefixes at a few prices
    of √A are solutions for all smaller budgets. Among all elements each budget would take a choice, of 7 s for MiniLM.

    Args:
        groups: the candidates.
        elements: this rank's shards of their statistics.
        best: the joint choice at the whole budget.
        reach: reach τ of the planned training.
        ranks: ranks that hold the statistics.
    """
    positions = positions_of(groups, elements)
    steepest = top_k(Scores(elements, _slope), positions, best.count, ranks.all_reduce)
    mine = [torch.empty(0, dtype=torch.float64)]
    for shard, position, picks in zip(elements, positions, steepest, strict=True):
        piece = shard.slice
        part = best.parts.get(groups.parameters[piece.parameter].name)
        is_chosen = mask_of(part, piece.start, piece.start + piece.length)
        is_kept = is_chosen.clone()
        is_kept[picks.cpu()] = True
        kept = is_kept.nonzero().squeeze(1)
        columns = {name: column[kept.to(column.device)] for name, column in shard.columns.items()}
        rows = [kept + position, is_chosen[kept], _slope(columns).cpu(), _root(columns).cpu()]
        mine.append(torch.stack([row.to(torch.float64) for row in rows], dim=1).flatten())
    together = torch.cat(ranks.all_gather(torch.cat(mine))).unflatten(0, (-1, 4))
    _, is_chosen, slopes, roots = together[together[:, 0].argsort()].T  # in an order that no division changes
    # The choice at the number that is found may miss its bound by the gap.
    wanted = ENOUGH * best.choice.needed("value") / (1 - _GAP)
    number = best.count
    for share in torch.linspace(0, 1, _PRICES, dtype=torch.float64):
        price = share * reach * roots[is_chosen > 0].sum()
        order = (price * roots - slopes).argsort(stable=True)
        value = influence(slopes[order].cumsum(0), roots[order].cumsum(0).square(), reach)
        enough = (value >= wanted).nonzero().flatten()
        number = min([number, *(enough[:1] + 1).tolist()])
    return choose_elements_jointly(groups, elements, number, reach, ranks)


def _slope(columns: dict[str, Tensor]) -> Tensor:
    return columns["slope"]


def _root(columns: dict[str, Tensor]) -> Tensor:
    return columns["curvature"].clamp(min=0).sqrt()
