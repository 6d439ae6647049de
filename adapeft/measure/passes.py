"""Passes over the calibration: a gradient for each global batch, at true or at sampled labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from adapeft.inputs.batches import Calibration
from adapeft.inputs.losses import Collate, Loss, micro_losses
from adapeft.inputs.objective import Objective
from adapeft.measure.shards import Shards

Progress = Callable[[str, int, int], None]
"""Called with the name of a pass, the batches done and their number."""


@dataclass(frozen=True)
class Passes:
    """The calibration of one measurement, ready to be run through shards.

    Attributes:
        collate: example indices → a micro-batch.
        seed: of the sampled labels.
    """

    shards: Shards
    objective: Objective
    calibration: Calibration
    collate: Collate
    seed: int
    progress: Progress = lambda name, done, total: None

    def gradients(
        self, name: str, batches: Sequence[np.ndarray], *, sampled_labels: bool = False
    ) -> Iterator[tuple[list[Tensor], int]]:
        """For each global batch its mean-loss gradient (a tensor a slice) and the number of predictions in the mean."""
        for done, batch in enumerate(batches):
            losses, num_predictions = self._losses(batch, sampled_labels=sampled_labels)
            with self.shards.gradients(losses) as gradients:
                yield gradients, num_predictions
            self.progress(name, done + 1, len(batches))

    def loss(self, batches: Sequence[np.ndarray]) -> float:
        """Mean loss over all predictions of ``batches``, without gradients. Collective."""
        total, weight = 0.0, 0
        for batch in batches:
            losses, num_predictions = self._losses(batch, sampled_labels=False)
            total += self.shards.loss(losses) * num_predictions
            weight += num_predictions
        return total / weight

    @contextmanager
    def training_gradients(self, batch: np.ndarray, learning_rate: float) -> Iterator[list[Tensor]]:
        """The candidates' gradients for a global batch; on leaving, the always-trained part steps on the same batch."""
        losses, _ = self._losses(batch, sampled_labels=False)
        with self.shards.gradients(losses) as gradients:
            yield gradients
        self.shards.train_step(losses, learning_rate)

    def warm_up(self, num_steps: int, learning_rate: float) -> None:
        """Trains the always-trained part over half A: behind a random head gradients mean nothing.

        Never over half B: at the optimum of both halves together their gradients are opposite in all that the head can
        express, so that every slope along half A's direction would come out negative.
        """
        batches = self.calibration.half_a
        for step in range(num_steps):
            losses, _ = self._losses(batches[step % len(batches)], sampled_labels=False)
            # Falling to zero: a head still swinging about its optimum asks every layer to shift all logits alike.
            self.shards.train_step(losses, learning_rate * (1 - step / num_steps))
            self.progress("warm-up", step + 1, num_steps)

    def _losses(self, batch: np.ndarray, *, sampled_labels: bool) -> tuple[list[Loss], int]:
        return micro_losses(
            batch,
            self.collate,
            self.objective,
            self.shards.ranks,
            self.shards.num_micro,
            self.shards.device,
            self.seed if sampled_labels else None,
        )
