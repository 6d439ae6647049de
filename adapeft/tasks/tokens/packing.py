"""Packed batches: examples share rows, in which the positions of each count from 0.

transformers derives from the positions which tokens attend to each other, if there is neither an attention mask nor a
cache (``find_packed_sequence_indices`` in ``masking_utils``). Padding at the end of a row counts from 0 too, like
another example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adapeft.data.description import Batch
from adapeft.tasks.losses.objective import IGNORED


def packed_batch(
    tokens: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    ids: Tensor,
    rows: Sequence[Sequence[int]],
    pad: int,
) -> Batch:
    """Return examples as a batch of fewer rows.

    Args:
        tokens: token ids of the n examples.
        labels: their labels, of the same lengths. That of the first token is ignored: it has no context.
        ids: int64 [n], indices of the examples in their data set.
        rows: places in ``ids`` of the examples in each row, as ``rows_of`` returns them.
        pad: token id of the padding.
    """
    lengths = [len(one) for one in tokens]
    shape = len(rows), max(sum(lengths[example] for example in row) for row in rows)
    inputs, targets = torch.full(shape, pad), torch.full(shape, IGNORED)
    positions, example_of = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            place = number, slice(start, start + lengths[example])
            inputs[place], example_of[place] = torch.tensor(tokens[example]), example
            targets[place] = torch.tensor([IGNORED, *labels[example][1:]])
            positions[place] = torch.arange(lengths[example])
            start += lengths[example]
        positions[number, start:] = torch.arange(shape[1] - start)
    return Batch({"input_ids": inputs, "position_ids": positions, "use_cache": False}, targets, ids, example_of)


def rows_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the examples of each row: few rows, of about the same number of tokens.

    One example per row, if rows of several would hold more padding than that.

    Args:
        lengths: number of tokens of each example.
        capacity: maximum number of tokens of a row, at least that of the longest example.
    """
    longest = max(lengths)
    num_rows = len(_filled(lengths, capacity))
    shortest = max(longest, math.ceil(sum(lengths) / num_rows))
    tried = (*range(shortest, capacity, max(1, (capacity - shortest) // _TRIALS)), capacity)
    rows = next(rows for most in tried if len(rows := _filled(lengths, most)) <= num_rows)
    if len(rows) * max(sum(lengths[example] for example in row) for row in rows) > len(lengths) * longest:
        return [[example] for example in range(len(lengths))]
    return rows


_TRIALS = 16
"""Number of lengths of rows that are tried to find the shortest."""


def _filled(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of which each example takes the first with room for it."""
    rows: list[list[int]] = []
    used: list[int] = []
    for example, length in enumerate(lengths):
        row = next((row for row, tokens in enumerate(used) if tokens + length <= capacity), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(example)
        used[row] += length
    return rows
