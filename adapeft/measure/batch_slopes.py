"""Slopes of groups in every single batch, and the standard errors of their means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from adapeft.measure.groups import Groups
from adapeft.measure.shards.shards import Shards
from adapeft.measure.sums import parts_of


class BatchSlopes:
    """The slope of every group in every batch of a pass, summed while the gradients of the batch are folded.

    Attributes:
        sums: what a pass saves of it.

    Args:
        shards: shards through which the gradients come.
        groups: the groups.
        direction: flat tensors aligned with ``shards.slices``; a slope is the product of a gradient with them.
        num_batches: number of batches of the pass.
        candidates: candidate of each parameter of ``shards``; by default they are the candidates.
    """

    def __init__(
        self,
        shards: Shards,
        groups: Groups,
        direction: Sequence[Tensor],
        num_batches: int,
        candidates: Sequence[int] | None = None,
    ) -> None:
        self._shards, self._groups, self._direction = shards, groups, direction
        self._candidates = range(len(groups.parameters)) if candidates is None else candidates
        self._row = torch.zeros(groups.num_groups, dtype=torch.float64, device=shards.device)
        self._table = torch.zeros(num_batches, groups.num_groups, dtype=torch.float64)
        self._weights = torch.zeros(num_batches, dtype=torch.float64)
        self._done = torch.zeros(1, dtype=torch.int64)
        self.sums = [self._table, self._weights, self._done]

    def add(self, place: int, gradient: Tensor) -> None:
        """Add the gradient of a slice in the current batch, or one micro-batch's part of it."""
        piece = self._shards.slices[place]
        candidate = self._candidates[piece.parameter]
        for start, (part, along) in parts_of(piece.start, gradient, self._direction[place]):
            touched, sums = self._groups.sums(candidate, start, part * along)
            self._row[touched] += sums

    def finish(self, num_predictions: int) -> None:
        """Finish the current batch. Collective."""
        self._table[self._done] = self._shards.ranks.all_reduce(self._row).cpu()
        self._row.zero_()
        self._weights[self._done] = num_predictions
        self._done += 1

    def errors(self) -> np.ndarray:
        """Return the standard error of each group's slope, float64 [K]; see ``standard_errors``."""
        return standard_errors(self._table.numpy(), self._weights.numpy())


def standard_errors(each: np.ndarray, num_predictions: np.ndarray) -> np.ndarray:
    """Return the standard errors of the means over all predictions of M batches, float64 [K]; NaN for one batch.

    Args:
        each: mean of each batch. [M, K].
        num_predictions: number of predictions of each batch. [M].
    """
    mean = np.average(each, axis=0, weights=num_predictions)
    spread = np.average((each - mean) ** 2, axis=0, weights=num_predictions)
    degrees = len(num_predictions) - 1
    return np.sqrt(spread / degrees) if degrees > 0 else np.full_like(mean, np.nan)
