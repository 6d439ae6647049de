"""Passes over the calibration: a gradient for each global batch, at true or at sampled labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from adapeft.inputs.batches import Calibration, micro_batches
from adapeft.inputs.data import Batch
from adapeft.inputs.objective import Objective
from adapeft.measure.shards import Loss, Shards

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
    collate: Callable[[np.ndarray], Batch]
    seed: int
    progress: Progress = lambda name, done, total: None

    def gradients(
        self, name: str, batches: Sequence[np.ndarray], *, sampled_labels: bool = False
    ) -> Iterator[tuple[list[Tensor], int]]:
        """For each global batch its mean-loss gradient (a tensor a slice) and the number of predictions in the mean."""
        for done, batch in enumerate(batches):
            losses, num_predictions = self._losses(batch, sampled_labels)
            with self.shards.gradients(losses) as gradients:
                yield gradients, num_predictions
            self.progress(name, done + 1, len(batches))

    def warm_up(self, num_steps: int, learning_rate: float) -> None:
        """Trains the always-trained part for ``num_steps`` over the calibration: a random head has no useful gradient."""
        batches = self.calibration.batches
        for step in range(num_steps):
            losses, _ = self._losses(batches[step % len(batches)], sampled_labels=False)
            self.shards.train_step(losses, learning_rate)
            self.progress("warm-up", step + 1, num_steps)

    def _losses(self, batch: np.ndarray, sampled_labels: bool) -> tuple[list[Loss], int]:
        """This rank's losses, whose sum over ranks and micro-batches is the mean over the global batch."""
        shares = micro_batches(batch, self.shards.ranks.rank, self.shards.ranks.world_size, self.shards.num_micro)
        # A rank without examples still takes part in every collective of the model's forward, at weight 0.
        micros = [(self.collate(share if len(share) else batch[:1]), bool(len(share))) for share in shares]
        local = sum(self.objective.num_predictions(micro.labels) for micro, counts in micros if counts)
        total = int(self.shards.ranks.all_reduce(torch.tensor([local], device=self.shards.device)).item())
        weights = [1.0 / total if counts else 0.0 for _, counts in micros]
        return [
            self._loss(micro.to(self.shards.device), weight, sampled_labels)
            for (micro, _), weight in zip(micros, weights, strict=True)
        ], total

    def _loss(self, batch: Batch, weight: float, sampled_labels: bool) -> Loss:
        def loss(model: nn.Module) -> Tensor:
            logits = self.objective.forward(model, batch)
            labels = self.objective.sample_labels(logits, batch, self.seed) if sampled_labels else batch.labels
            return self.objective.loss_sum(logits, labels) * weight

        return loss
