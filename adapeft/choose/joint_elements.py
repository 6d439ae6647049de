"""Single elements by what they promise together, at the most that their joint curvature can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapeft.choose.elements import positions_of, subset_of_picks
from adapeft.choose.topk import top_k
from adapeft.measure.groups import Groups
from adapeft.measure.influence import influence
from adapeft.measure.statistics import ElementShard
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset

_GAP = 1e-4
_HALVINGS = 40


@dataclass(frozen=True)
class _Candidate:
    """What a price λ of √A makes of the elements.

    Attributes:
        picks: this rank's, by shard.
        slope: Σb of the picks on all ranks.
        root: Σ√A of them.
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
    groups: Groups, elements: Sequence[ElementShard], budget: int, reach: float, ranks: Ranks
) -> Subset:
    r"""At most ``budget`` elements of largest joint influence, the same on every rank. Collective.

    What trains together takes one step η ≤ τ, and its joint curvature is at most :math:`(\sum_S\sqrt{A})^2`, by Cauchy
    and Schwarz in the metric of the Fisher matrix. Thousands of the steepest elements come near that, because they
    change the output alike (tests/benchmarks/results/stsb.md); so their joint influence is at least

    .. math:: G(S) = \max_{\eta \le \tau} \eta \sum_S b - \tfrac12 \eta^2 \Big(\sum_S \sqrt{A}\Big)^2.

    Since :math:`\tfrac12\eta^2C^2 \ge \lambda\eta C - \tfrac12\lambda^2`, every price λ of √A bounds it for all S:

    .. math:: G(S) \le \tau \sum_{\text{top } k} \big(b - \lambda\sqrt{A}\big)_+ + \tfrac12\lambda^2.

    The bound is convex in λ. Where it is least, :math:`\lambda = \tau\sum_S\sqrt A` for the elements that it counts,
    and these reach it but for what one element more or less makes. Bisection finds them, and leaves of the budget what
    would add more curvature than slope. The description has ``value`` G, ``bound``, ``gap``, and ``unspent``: how many
    elements of the budget that is.
    """
    slopes = [shard.columns["slope"] for shard in elements]
    roots = [shard.columns["curvature"].clamp(min=0).sqrt() for shard in elements]
    positions = positions_of(groups, elements)

    def at(price: float) -> _Candidate:
        scores = [slope - price * root for slope, root in zip(slopes, roots, strict=True)]
        picks = top_k(scores, positions, budget, ranks.all_reduce)
        sums = torch.zeros(2, dtype=torch.float64)
        for slope, root, mine in zip(slopes, roots, picks, strict=True):
            sums += torch.stack([slope[mine].sum(dtype=torch.float64), root[mine].sum(dtype=torch.float64)]).cpu()
        return _Candidate(picks, *ranks.all_reduce(sums).tolist())

    best = at(0.0)
    bound = best.bound(reach, 0.0)
    low, high = 0.0, reach * best.root  # the root falls as its price rises
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
    subset = subset_of_picks(groups, best.picks, positions, ranks)
    return subset.described(
        value=value,
        bound=bound,
        gap=gap,
        unspent=budget - subset.count,
        status="within_gap" if gap <= _GAP else "feasible",
    )
