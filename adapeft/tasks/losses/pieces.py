"""Cross-entropy of many positions over a large vocabulary, computed in pieces of bounded memory.

Logits of all positions take more memory than any other tensor of a language model: 4 · n · T · V bytes in float32, and
the loss keeps their log-probabilities too. Here only one piece of them exists at a time, in either pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adapeft.tasks.losses.draws import wide
from adapeft.tasks.losses.objective import IGNORED

PIECE_BYTES = 2**26
"""Maximum bytes of float32 logits that are computed at once; the backward pass needs up to four times that."""

Tail = Callable[[Tensor], Tensor]
"""What computes logits [m, V] from the states [m, H] of any m positions."""


def num_pieces(num_positions: int, num_outputs: int) -> int:
    """Return the number of pieces whose float32 logits have at most ``PIECE_BYTES`` each."""
    return max(1, -(-4 * num_positions * num_outputs // PIECE_BYTES))


def rows_in_double(tensor: Tensor) -> tuple[Tensor, ...]:
    """Split a tensor into some rows at a time [..., C] → [r, C], of which several float64 copies fit into a piece."""
    num_columns = tensor.shape[-1]
    return tensor.reshape(-1, num_columns).split(max(1, PIECE_BYTES // (16 * num_columns)))


@torch.no_grad()
def sample_categorical(logits: Tensor, draws: Tensor) -> Tensor:
    """Sample by inverse CDF in float64: logits [m, C], draws [m] in (0, 1) → int64 [m]."""
    found, start = [], 0
    for rows in rows_in_double(logits):
        uniform = draws[start : start + len(rows)].to(logits.device).unsqueeze(-1)
        found.append(torch.searchsorted(rows.double().softmax(-1).cumsum(-1), uniform).squeeze(-1))
        start += len(rows)
    return torch.cat(found).clamp(max=logits.shape[-1] - 1)


def losses_in_pieces(states: Tensor, tail: Tail, targets: Tensor, draws: Tensor | None, pieces: int) -> Tensor:
    """Return the cross-entropy of each position in float32, or in float64 if the logits are; 0 where ignored.

    The backward pass calls the tail a second time for each piece, instead of keeping the logits.

    Args:
        states: states [m, H] of m positions.
        tail: function from states to logits.
        targets: labels int64 [m], -100 where ignored.
        draws: uniform draws [m], with which labels replace ``targets``, except where ignored; None: the targets.
        pieces: number of pieces, at most m.
    """
    if pieces == 1:
        return _losses(states, tail, targets, draws, [])
    sizes = [len(piece) for piece in targets.tensor_split(pieces)]
    parts = zip(
        states.split(sizes),  # whose gradients are concatenated; those of slices would all have the size of the whole
        targets.split(sizes),
        [None] * pieces if draws is None else draws.split(sizes),
        strict=True,
    )
    return torch.cat([checkpoint(_losses, part, tail, *labels, [], use_reentrant=False) for part, *labels in parts])


def _losses(states: Tensor, tail: Tail, targets: Tensor, draws: Tensor | None, sampled: list[Tensor]) -> Tensor:
    """Return the losses of one piece; ``sampled`` keeps the labels that were drawn, for a second call."""
    logits = tail(states)
    if draws is not None:
        if not sampled:
            sampled.append(torch.where(targets == IGNORED, IGNORED, sample_categorical(logits, draws)))
        targets = sampled[0]
    return F.cross_entropy(wide(logits), targets, ignore_index=IGNORED, reduction="none")
