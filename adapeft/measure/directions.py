"""In how many directions a subset can change the outputs of the model, compared with all candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.groups import Groups
from adapeft.measure.low_rank.windows import SeenShards
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import Slice
from adapeft.parts.elements import Elements
from adapeft.parts.part import Part, mask_of
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.ranks import Ranks

_ELEMENTS = 100_000
"""Elements of the subset, and of all candidates, whose gradients are kept for every batch."""

_MOST_BATCHES = 16
_FEWEST_BATCHES = 4
_TOLD = 1 / 3
"""Share of the most directions that the batches can show. Candidates at the most may have any number above it: how many
more than a subset with this share or above is then unknown."""


class Directions(NamedTuple):
    """Numbers of directions.

    Attributes:
        chosen: those of a subset.
        candidates: those of a uniform sample of all candidates, and so of a uniform draw.
    """

    chosen: float
    candidates: float


def measure_directions(passes: Passes, groups: Groups, parts: Mapping[str, Part]) -> Directions | None:
    r"""Return the effective ranks of the gradients of a subset and of all candidates, from one pass over half B.

    Gradients :math:`\tilde g_m` of batches at sampled labels have the mean 0 and, times √T, the second moment F, so
    that over M batches :math:`\overline{\|\tilde g_m\|^2}` estimates tr F and, over pairs,
    :math:`\overline{(\tilde g_m^\top \tilde g_n)^2}` estimates tr F², without bias and for ranks far above M. The
    effective rank is (tr F)² / tr F². Elements are weighted by the reciprocal root of their own mean square, as Adam
    weighs them. On MiniLM 16 batches of 16 give 78 and 4.6 where the spectrum of 256 single examples has 72 and 4 (all
    elements of the demo's docstrings, and the 1,618 chosen ones).

    Args:
        passes: passes whose head is warmed up for half B.
        groups: the candidates, without those that no batch reaches.
        parts: parts of the subset by parameter.

    Returns:
        The same on every rank; None if half B has fewer than four batches, or too few to tell how many more directions
        the candidates have than the subset, or if parts train something else than elements of the candidates, or the
        measurement sees these through windows. Collective.
    """
    shards, half_b = passes.shards, passes.predicting(passes.calibration.half_b[:_MOST_BATCHES])
    is_possible = all(isinstance(part, Rows | Elements | Whole) for part in parts.values())
    if len(half_b) < _FEWEST_BATCHES or not parts or not is_possible or isinstance(shards, SeenShards):
        return None
    starts = {info.name: start for info, start in zip(groups.parameters, groups.starts[:-1].tolist(), strict=True)}
    drawn = np.unique(np.random.default_rng([passes.seed, 7]).integers(groups.starts[-1], size=_ELEMENTS))
    share = _ELEMENTS / max(1, sum(part.count for part in parts.values()))

    def picked(piece: Slice) -> tuple[Tensor, Tensor]:
        name = shards.names[piece.parameter]  # the slices are of all that was measured, also of unreached parameters
        if name not in starts:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        return _chosen(piece, starts[name], parts.get(name), share), _drawn(piece, starts[name], drawn)

    picks = [tuple(which.to(shards.device) for which in picked(piece)) for piece in shards.slices]
    places = [np.cumsum([0, *(len(each[kind]) for each in picks)]) for kind in (0, 1)]
    tables = [torch.zeros(len(half_b), int(ends[-1]), device=shards.device) for ends in places]
    weights = torch.zeros(len(half_b), dtype=torch.float64)
    done = 0

    def take(place: int, gradient: Tensor, _: int) -> None:
        for table, ends, which in zip(tables, places, picks[place], strict=True):
            table[done, ends[place] : ends[place + 1]] += gradient[which]

    # Not saved for a resumed measurement: these sums depend on the choice, and are made again.
    unsaved = replace(passes, saved=None)
    for num_predictions in unsaved.fold("directions", half_b, [], take, sampled_labels=True, is_linear=True):
        weights[done] = num_predictions
        done += 1
    found = Directions(*(effective_rank(_gram(table, weights, shards.ranks)) for table in tables))
    most = most_directions(len(half_b))
    return None if found.candidates >= most and found.chosen >= _TOLD * most else found


def effective_rank(gram: Tensor) -> float:
    """Return the effective rank of the second moment of M vectors of mean 0 from their inner products, [M, M]."""
    squares = gram.diagonal()
    pairs = most_directions(len(gram))
    between = float((gram.square().sum() - squares.square().sum()) / pairs)
    # Less than one direction, or more than the pairs can tell apart, is noise of the estimate.
    return min(max(float(squares.mean()) ** 2 / between, 1.0), float(pairs)) if between > 0 else 1.0


def most_directions(num_vectors: int) -> int:
    """Return the largest effective rank that ``num_vectors`` vectors can show, the number of their ordered pairs."""
    return num_vectors * (num_vectors - 1)


def _gram(table: Tensor, weights: Tensor, ranks: Ranks) -> Tensor:
    """Return the inner products of the batches' gradients over all ranks, weighted as Adam does: float64 [M, M]."""
    scaled = table * weights.sqrt().to(table)[:, None]
    sizes = scaled.square().mean(dim=0).sqrt()
    sums = torch.tensor([float(sizes.sum(dtype=torch.float64)), len(sizes)], dtype=torch.float64)
    total, count = ranks.all_reduce(sums).tolist()
    weighted = scaled / sizes.clamp(min=1e-3 * total / count or 1.0)  # 1 if no element has a gradient
    return ranks.all_reduce((weighted @ scaled.T).double().cpu())


def _chosen(piece: Slice, start: int, part: Part | None, share: float) -> Tensor:
    """Return the chosen elements of a slice, or a sample of about ``share`` of them that no division changes."""
    found = mask_of(part, piece.start, piece.start + piece.length).nonzero().squeeze(1)
    if share >= 1:
        return found
    mixed = ((found + piece.start + start) * 2654435761) % 2**32  # Knuth's multiplicative hash of the position
    return found[mixed < share * 2**32]


def _drawn(piece: Slice, start: int, positions: np.ndarray) -> Tensor:
    """Return the elements of a slice that are among ``positions`` of all candidates, which are ascending."""
    first, last = np.searchsorted(positions, [start + piece.start, start + piece.start + piece.length])
    return torch.from_numpy(positions[first:last] - start - piece.start)
