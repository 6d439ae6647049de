"""Assignment of examples to global batches and of these to ranks; global batches do not depend on the world size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapeft.errors import AdapeftError


@dataclass(frozen=True)
class Calibration:
    """The examples that measuring uses, as two disjoint halves of global batches of example indices.

    The direction comes from half A and the slope along it from half B, so that their noise is independent: on the same
    examples the noise of the gradient would be squared into the slope.
    """

    half_a: tuple[np.ndarray, ...]
    half_b: tuple[np.ndarray, ...]

    @property
    def batches(self) -> tuple[np.ndarray, ...]:
        return self.half_a + self.half_b


def draw_calibration(num_examples: int, calibration: int, batch_size: int, world_size: int, seed: int) -> Calibration:
    """Draw ``calibration`` examples without replacement (all examples if there are fewer).

    Raises:
        AdapeftError: there are fewer examples than ranks, or than the two halves need.
    """
    available = min(num_examples, calibration)
    needed = max(2, world_size)
    if available < needed:
        raise AdapeftError(
            f"select.calibration = {calibration} with data.train of {num_examples} examples leaves {available} "
            f"example(s) to measure on, fewer than the {needed} that {world_size} rank(s) need. Raise "
            f"select.calibration, give more training data or lower cluster.workers."
        )
    order = np.random.default_rng([seed, 0]).permutation(num_examples)[:available]
    middle = available // 2
    return Calibration(_cut(order[:middle], batch_size), _cut(order[middle:], batch_size))


def epoch_batches(
    num_examples: int, batch_size: int, seed: int, epoch: int, lengths: Sequence[int] | None = None
) -> tuple[np.ndarray, ...]:
    """Return the global batches of one training epoch in the order of ``seed`` and ``epoch``; the last may be short.

    Args:
        num_examples: number of training examples.
        batch_size: size of a global batch.
        seed: random seed of the run.
        epoch: number of the epoch, counted from 0.
        lengths: lengths of the examples in tokens, to draw batches of examples of similar length as ``transformers``
            does with ``train_sampling_strategy="group_by_length"``; None: batches of any examples.
    """
    if lengths is None:
        return _cut(np.random.default_rng([seed, 1, epoch]).permutation(num_examples), batch_size)
    # Imported here, because most runs do not need transformers' trainer.
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    state = int(np.random.SeedSequence([seed, 1, epoch]).generate_state(1)[0])
    order = get_length_grouped_indices(lengths, batch_size, generator=torch.Generator().manual_seed(state))
    return _cut(np.array(order), batch_size)


def evaluation_batches(num_examples: int, batch_size: int) -> tuple[np.ndarray, ...]:
    return _cut(np.arange(num_examples), batch_size)


def num_micro_batches(batch_size: int, world_size: int, micro_batch_size: int | None) -> int:
    """Return how many micro-batches a rank's share of a global batch has (1 if ``micro_batch_size`` is None)."""
    share = math.ceil(batch_size / world_size)
    return math.ceil(share / micro_batch_size) if micro_batch_size else 1


def micro_batches(batch: np.ndarray, rank: int, world_size: int, num_micro: int) -> list[np.ndarray]:
    """Return the rank's share of a global batch in exactly ``num_micro`` pieces, some of which may be empty."""
    return np.array_split(np.array_split(batch, world_size)[rank], num_micro)


def _cut(indices: np.ndarray, batch_size: int) -> tuple[np.ndarray, ...]:
    return tuple(indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
