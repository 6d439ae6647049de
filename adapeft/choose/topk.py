"""Exact global top-k of distributed scores: ranks (or files) exchange histograms, never scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_RUN = 2**20
"""Scores whose keys are computed at once; they and what follows from them take up to 30 MB."""

Reduce = Callable[[Tensor], Tensor]
"""Function that sums a tensor over the ranks; the identity for one process."""


def top_k(scores: Sequence[Tensor], positions: Sequence[int], k: int, all_reduce: Reduce) -> list[Tensor]:
    """Return the local members of the k largest positive scores over all ranks.

    Args:
        scores: this rank's pieces, float32, each 1-D; read several times, one after the other.
        positions: global position of each piece's first score; over all ranks every position occurs once.
        k: number of scores to choose; fewer are chosen if fewer scores are positive.
        all_reduce: function that sums an int64 tensor over the ranks.

    Returns:
        The chosen indices into each piece, int64, ascending. Ties are broken by the lower position, so the result
        depends only on the scores and not on their division into pieces.
    """
    device = scores[0].device if scores else torch.device("cpu")
    num_positive = torch.tensor([sum(int((score > 0).sum()) for score in scores)], device=device)
    k = min(k, int(all_reduce(num_positive).item()))
    if k <= 0:
        return [torch.empty(0, dtype=torch.int64, device=device) for _ in scores]
    # The bit patterns of positive floats have the same order as the floats; the k largest become the k smallest keys.
    threshold, num_below, num_tied = _kth_smallest(lambda: _keys(scores), k, 32, all_reduce, device)
    if num_below + num_tied == k:  # nearly always: all tied scores fit
        return [_where(score, lambda keys: keys <= threshold) for score in scores]

    def tied_in(score: Tensor) -> Tensor:
        return _where(score, lambda keys: keys == threshold)

    def tied_positions() -> Iterator[Tensor]:
        for score, position in zip(scores, positions, strict=True):
            yield tied_in(score) + position

    last, *_ = _kth_smallest(tied_positions, k - num_below, 48, all_reduce, device)

    def chosen(score: Tensor, position: int) -> Tensor:
        tied = tied_in(score)
        return torch.cat([_where(score, lambda keys: keys < threshold), tied[tied + position <= last]]).sort().values

    return [chosen(score, position) for score, position in zip(scores, positions, strict=True)]


def _runs(score: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the scores of a piece a few at a time, with the index of the first."""
    for start in range(0, len(score), _RUN):
        yield start, score[start : start + _RUN]


def _keys(scores: Iterable[Tensor]) -> Iterator[Tensor]:
    for score in scores:
        for _, run in _runs(score):
            yield _descending_key(run)


def _where(score: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the indices of a piece at whose keys a condition holds, int64, ascending."""
    found = [torch.nonzero(holds(_descending_key(run))).squeeze(1) + start for start, run in _runs(score)]
    return torch.cat([torch.empty(0, dtype=torch.int64, device=score.device), *found])


def _descending_key(score: Tensor) -> Tensor:
    bits = score.float().clamp(min=0.0).view(torch.int32).long()
    return torch.where(score > 0, 0x7FFFFFFF - bits, 0xFFFFFFFF)


def _kth_smallest(
    pieces: Callable[[], Iterable[Tensor]], k: int, num_bits: int, all_reduce: Reduce, device: torch.device
) -> tuple[int, int, int]:
    """Return the k-th smallest non-negative int64 key over all ranks (k ≥ 1), and how many keys are smaller and equal.

    Each round refines one 16-bit digit and exchanges 65,536 counts, for any number of keys.
    """
    prefix, num_below, num_equal = 0, 0, 0
    for shift in range(num_bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        within = (piece[piece >> (shift + _DIGIT_BITS) == prefix] for piece in pieces())
        counts = all_reduce(_histogram(((keys >> shift) & (_DIGITS - 1) for keys in within), device))
        cumulative = counts.cumsum(0)
        digit = int(torch.searchsorted(cumulative, k - num_below))
        num_equal = int(counts[digit])
        num_below += int(cumulative[digit]) - num_equal
        prefix = (prefix << _DIGIT_BITS) | digit
    return prefix, num_below, num_equal


def _histogram(pieces: Iterable[Tensor], device: torch.device) -> Tensor:
    """Count the digits; returns int64 [65,536].

    Small pieces are counted together: one histogram for each of 40 tensors of 500 elements is 130 times the work of
    counting their elements, and every addition of two histograms wakes torch's thread pool. Choosing 19,616 elements
    that way took 15 s on a busy machine with two cores.
    """
    total = torch.zeros(_DIGITS, dtype=torch.int64, device=device)
    waiting: list[Tensor] = []
    num_waiting = 0
    for piece in pieces:
        waiting.append(piece)
        num_waiting += len(piece)
        if num_waiting >= _DIGITS:
            total += torch.bincount(torch.cat(waiting), minlength=_DIGITS)
            waiting, num_waiting = [], 0
    if num_waiting:
        total += torch.bincount(torch.cat(waiting), minlength=_DIGITS)
    return total
