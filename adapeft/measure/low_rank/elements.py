r"""Slope and curvature of every element from factors that are seen through windows on both sides.

With a basis V [in, m] of the row space and a basis U [out, m] of the column space of half A's mean gradient, leaves
show :math:`gV` and :math:`g^\top U` of any gradient, which give

.. math:: g \approx g V V^\top + U U^\top g\, (1 - V V^\top),

all of it but what lies outside of both spaces. The direction is Adam's step along this form of half A's gradient, with
second moments factored as in Adafactor (Shazeer and Stern 2018, algorithm 2), and slopes are its products with this
form of half B's gradient. Seen from one side alone, half B's gradient loses too much
(tests/benchmarks/results/low-rank.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.batch_slopes import BatchSlopes
from adapeft.measure.direction import NOISE
from adapeft.measure.exact.elementwise import mean_gradient, shrinkage_of
from adapeft.measure.groups import Groups
from adapeft.measure.low_rank.factored import OF_COLUMNS, OF_ROWS, FactoredShard
from adapeft.measure.low_rank.moments import (
    MatrixMoments,
    Moments,
    MomentSums,
    basis_of,
    column_scale,
    measure_moments,
    root_mean_square,
    root_mean_square_of_mean,
    row_scale,
    strength,
)
from adapeft.measure.low_rank.windows import SeenShards, gathered
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.model.structure import ParameterInfo

_LARGEST = 2**21
"""Elements of one shard at most, so that choosing holds 8 MB of a column at once."""


class Product(NamedTuple):
    """A matrix [out, in] as the product of ``rows`` [out, k] and the transpose of ``columns`` [in, k]; or E of them."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class ElementDirection:
    """The direction of single elements.

    Attributes:
        products: candidate with windows → its direction.
        others: this rank's pieces of the direction of the candidates without a window, aligned with the slices; what
            belongs to windows is not used.
    """

    products: Mapping[int, Product]
    others: Sequence[Tensor]


def measure_direction_of_elements(passes: Passes, kind: str) -> ElementDirection:
    """Return the direction over half A in two passes, whose windows stay. Collective.

    Args:
        passes: passes whose shards are ``SeenShards``.
        kind: ``adam`` or ``gradient``, as for ``measure_direction``.
    """
    shards = _seen(passes)
    moments = measure_moments(passes, shards, "ranges", passes.calibration.half_a)
    right = {candidate: basis_of(one.left) for candidate, one in moments.of_matrices.items()}
    left = {candidate: basis_of(one.right) for candidate, one in moments.of_matrices.items()}
    shards.windows.look_along(right, left)
    products, others = _seen_gradient(passes, "direction", passes.calibration.half_a)
    if kind == "gradient":
        scale = root_mean_square_of_mean(shards, moments, others)
        products = {candidate: Product(one.rows / scale, one.columns) for candidate, one in products.items()}
        return ElementDirection(products, [piece / scale for piece in others])
    scale = root_mean_square(moments)
    for candidate, one in moments.of_matrices.items():
        rows, columns = products[candidate]
        length = one.columns.sum(-1, keepdim=True).sqrt() * strength(one, scale)
        rows = rows * (length / row_scale(one, scale))[..., None]
        products[candidate] = Product(rows, columns / column_scale(one, scale)[..., None])
    for piece, mean in zip(shards.slices, others, strict=True):
        if piece.parameter in moments.squares:
            square = moments.squares[piece.parameter][piece.start : piece.start + piece.length]
            mean.div_(square.sqrt().add_(NOISE * scale))
    return ElementDirection(products, others)


def measure_elements_of_low_rank(
    passes: Passes, groups: Groups, direction: ElementDirection, *, shrinkage: bool
) -> Statistics:
    """Measure ``slope`` and ``curvature`` of every element over half B in one pass. Collective.

    The elements of a matrix are divided among the ranks by its first dimension, whatever the ZeRO stage.

    Args:
        passes: passes through the windows of the direction.
        direction: result of ``measure_direction_of_elements``.
        shrinkage: as in ``measure_elements``.
    """
    shards, half_b = _seen(passes), passes.calibration.half_b
    slopes = _batch_slopes(shards, groups, direction, len(half_b))
    gradients, others, fisher = gradient_and_fisher(passes, slopes)
    if shrinkage:
        for squares in fisher.squares.values():
            share = shrinkage_of(squares.double().mean(), squares.double().square().mean(), len(half_b))
            squares.mul_(1.0 - share).add_(share * squares.mean(dtype=torch.float64))
    elements: list[ElementShard] = list(_of_the_others(shards, direction.others, others, fisher))
    for candidate, moments in fisher.of_matrices.items():
        info, step, gradient = groups.parameters[candidate], direction.products[candidate], gradients[candidate]
        diagonal = _fisher_diagonal(moments, len(half_b) if shrinkage else None)
        factors = dict(zip(OF_ROWS, (step.rows, gradient.rows, diagonal.rows), strict=True))
        factors |= zip(OF_COLUMNS, (step.columns, gradient.columns, diagonal.columns), strict=True)
        for expert, start, stop in _ranges(info, shards.ranks.rank, shards.ranks.world_size):
            elements.append(_shard(candidate, info, expert, start, stop, factors))
    columns = {**_sums(groups, elements, shards), "slope_error": slopes.errors()}
    return Statistics(groups, columns, tuple(elements))


def _batch_slopes(shards: SeenShards, groups: Groups, direction: ElementDirection, num_batches: int) -> BatchSlopes:
    r"""Return what sums the slopes of every batch from the gradients of the leaves, in which they are linear.

    With the direction :math:`D` of a matrix, the slope along the form above is

    .. math:: \langle gV, (1 - U U^\top) D V\rangle + \langle g^\top U, D^\top U\rangle.
    """
    windows = shards.windows
    candidates = [*range(len(groups.parameters)), *windows.matrices]
    leaves: dict[int, Tensor] = {}
    for leaf, candidate in enumerate(windows.matrices, start=len(groups.parameters)):
        u, v = windows.left_of(candidate), windows.right_of(candidate)
        rows, columns = direction.products[candidate]
        seen = rows @ (columns.mT @ v)
        leaves[candidate] = (seen - u @ (u.mT @ seen)).flatten()
        leaves[leaf] = (columns @ (rows.mT @ u)).flatten()
    own = {piece.parameter: other for piece, other in zip(shards.slices, direction.others, strict=True)}
    pieces = [
        leaves[piece.parameter][piece.start : piece.start + piece.length]
        if piece.parameter in leaves
        else own[piece.parameter]
        for piece in shards.all.slices
    ]
    return BatchSlopes(shards.all, groups, pieces, num_batches, candidates)


def _seen(passes: Passes) -> SeenShards:
    assert isinstance(passes.shards, SeenShards)
    return passes.shards


def gradient_and_fisher(
    passes: Passes, slopes: BatchSlopes | None = None
) -> tuple[dict[int, Product], list[Tensor], Moments]:
    """Return the mean gradient of half B as ``_seen_gradient``, and the moments of the Fisher matrix. Collective.

    A batch's gradients at true labels are seen through the windows as they are, those at sampled labels through random
    ones. Moments are those of gradients whose loss is summed over all T predictions of a mean batch, so that they are
    the diagonal of the Fisher matrix of one prediction times T. ``slopes`` gets those of every batch.
    """
    shards, half_b = _seen(passes), passes.calibration.half_b
    windows, seen = shards.windows, replace(passes, shards=shards.all)
    mean, drawn = ([torch.zeros(piece.length, device=shards.device) for piece in seen.shards.slices] for _ in range(2))
    weight, sums = torch.zeros(1, dtype=torch.float64), MomentSums(shards)

    def add(place: int, gradient: Tensor, num_predictions: int) -> None:
        mean[place].add_(gradient, alpha=num_predictions)
        if slopes is not None:
            slopes.add(place, gradient)

    def keep(place: int, gradient: Tensor, _: int) -> None:
        drawn[place].add_(gradient)

    own = windows.views()
    look = (lambda: windows.look_along(*own), windows.look_randomly)
    saved = [*mean, weight, *sums.totals, *(slopes.sums if slopes is not None else [])]
    for num_predictions in seen.fold_both("slope and curvature", half_b, saved, add, keep, prepare=look):
        weight += num_predictions
        if slopes is not None:
            slopes.finish(num_predictions)
        sums.add(drawn, num_predictions)
        for gradient in drawn:
            gradient.zero_()
    windows.look_along(*own)
    products = _products(shards, [total.div_(weight.item()) for total in mean])
    return products, shards.own(mean), sums.divided_by(len(half_b))


def _seen_gradient(passes: Passes, name: str, batches: Sequence[np.ndarray]) -> tuple[dict[int, Product], list[Tensor]]:
    """Return the mean gradient over the predictions of ``batches`` as seen through both windows. Collective.

    Returns:
        Candidate with windows → its gradient; and this rank's pieces, aligned with the slices.
    """
    shards = _seen(passes)
    mean = mean_gradient(replace(passes, shards=shards.all), name, batches)
    return _products(shards, mean), shards.own(mean)


def _products(shards: SeenShards, seen: Sequence[Tensor]) -> dict[int, Product]:
    """Return the gradient of each candidate with windows from the gradients of everything seen. Collective."""
    windows = shards.windows
    num_candidates = len(windows.groups.parameters)
    leaves = {candidate: num_candidates + place for place, candidate in enumerate(windows.matrices)}
    shapes = {leaf: windows.shapes[leaf] for leaf in (*windows.matrices, *leaves.values())}
    whole = gathered(shapes, shards.all.slices, seen, shards)
    products = {}
    for candidate, leaf in leaves.items():
        u, v = windows.left_of(candidate), windows.right_of(candidate)
        of_rows, of_columns = whole[candidate], whole[leaf]
        rest = of_columns - v @ (of_rows.mT @ u)
        products[candidate] = Product(torch.cat([of_rows, u], -1), torch.cat([v, rest], -1))
    return products


def _fisher_diagonal(moments: MatrixMoments, num_draws: int | None) -> Product:
    r"""Return Adafactor's second moments :math:`r_i c_j / s`, shrunk towards their mean if ``num_draws`` is given.

    Moments of rows and columns hardly have the noise of single draws for which ``shrinkage_of`` is derived, but the
    product of both is as far from an element's own. Unshrunk, dead coordinates win the joint choice: on SmolLM2 it took
    42,472 elements in 264 rows of rare tokens and had 0.3 % of the joint influence of the exact choice, which takes 186
    (five of its 31 layers, by exact statistics); shrunk it takes 224 and has 36 %.
    """
    rows, columns = moments.rows.double(), moments.columns.double()
    rows = rows / columns.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    mean = rows.mean(-1) * columns.mean(-1)
    share = torch.zeros_like(mean)
    if num_draws is not None:
        share = shrinkage_of(mean, rows.square().mean(-1) * columns.square().mean(-1), num_draws)
    kept, evened = (1 - share)[..., None] * rows, (share * mean)[..., None].expand_as(rows)
    return Product(
        torch.stack([kept, evened], -1).float(), torch.stack([columns, torch.ones_like(columns)], -1).float()
    )


def _of_the_others(
    shards: SeenShards, direction: Sequence[Tensor], gradient: Sequence[Tensor], fisher: Moments
) -> Iterator[ElementShard]:
    """Yield the shards of the candidates without a window."""
    for piece, along, slope in zip(shards.slices, direction, gradient, strict=True):
        if piece.parameter in fisher.squares:
            curvature = fisher.squares[piece.parameter][piece.start : piece.start + piece.length]
            yield ElementShard(piece, {"slope": slope * along, "curvature": curvature * along * along})


def _ranges(info: ParameterInfo, rank: int, world_size: int) -> Iterator[tuple[int, int, int]]:
    """Yield an expert (0 for a matrix) and a range along its first dimension for each shard of this rank."""
    *experts, size, width = info.shape
    total, step = prod(experts) * size, max(1, _LARGEST // width)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    while first < last:
        expert, start = divmod(first, size)
        stop = min(start + step, size, start + last - first)
        yield expert, start, stop
        first += stop - start


def _shard(
    candidate: int, info: ParameterInfo, expert: int, start: int, stop: int, factors: dict[str, Tensor]
) -> FactoredShard:
    is_transposed = info.output_dim == 1
    divided = OF_COLUMNS if is_transposed else OF_ROWS
    own = {name: tensor[expert] for name, tensor in factors.items()} if len(info.shape) == 3 else factors
    tensors = {name: tensor[start:stop] if name in divided else tensor for name, tensor in own.items()}
    *_, size, width = info.shape
    place = Slice(candidate, (expert * size + start) * width, (stop - start) * width)
    return FactoredShard(place, tensors, is_transposed)


def _sums(groups: Groups, elements: list[ElementShard], shards: SeenShards) -> dict[str, np.ndarray]:
    """Return the sums of the columns over the groups, which are tensors, float64 [K]. Collective."""
    sums = torch.zeros(2, groups.num_groups, dtype=torch.float64, device=shards.device)
    for shard in elements:
        own = shard.sums()
        sums[:, groups.firsts[shard.slice.parameter]] += torch.stack([own["slope"], own["curvature"]])
    slope, curvature = shards.ranks.all_reduce(sums).cpu().numpy()
    return {"slope": slope, "curvature": curvature}
