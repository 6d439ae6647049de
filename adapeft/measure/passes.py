"""Passes over the calibration: a gradient for each global batch, at true or at sampled labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from adapeft.inputs.batches import Calibration
from adapeft.inputs.losses import Collate, Loss, micro_losses
from adapeft.inputs.objective import Objective
from adapeft.measure.partial import PartialSums
from adapeft.measure.shards import Shards

Progress = Callable[[str, int, int], None]
"""Called with the name of a pass, the batches done and their number."""

WARMUP_LEARNING_RATE = 3e-3
"""Peak of AdamW's learning rate for the always-trained part.

A head that has not yet learned how frequent the classes are puts that into every layer's gradient. Measured on CoLA
(MiniLM, 512 examples): after 32 steps at a constant 1e-3 the pooler took 72 % of the budget for a promised decrease of
0.15; after 96 falling from 3e-3 it took nothing, and the promise was 0.0045.
"""


@dataclass(frozen=True)
class Passes:
    """The calibration of one measurement, ready to be run through shards.

    Attributes:
        collate: example indices → a micro-batch.
        seed: of the sampled labels.
        warmup_steps: of every warm-up.
        saved: where passes save their sums and take them up again; None: nowhere.
        seen: the first example of each batch whose gradient was computed.
    """

    shards: Shards
    objective: Objective
    calibration: Calibration
    collate: Collate
    seed: int
    progress: Progress = lambda name, done, total: None
    warmup_steps: int = 0
    saved: PartialSums | None = None
    seen: set[int] = field(default_factory=set)

    def gradients(
        self, name: str, batches: Sequence[np.ndarray], sums: Sequence[Tensor], *, sampled_labels: bool = False
    ) -> Iterator[tuple[list[Tensor], int]]:
        """For each global batch its mean-loss gradient (a tensor a slice) and the number of predictions in the mean.

        ``sums`` are all that the caller adds up of them, in place: where an interrupted measurement is taken up, they
        hold the batches that were done, and the others follow.
        """
        for index in self.steps(name, len(batches), sums):
            losses, num_predictions = self._losses(batches[index], sampled_labels=sampled_labels)
            self.seen.add(int(batches[index][0]))
            with self.shards.gradients(losses) as gradients:
                yield gradients, num_predictions

    def steps(self, name: str, total: int, sums: Sequence[Tensor]) -> Iterator[int]:
        """The steps of a pass that are still to do; ``sums`` as for ``gradients``. Collective."""
        done = self.saved.take_up(name, sums) if self.saved else 0
        if done:
            self.shards.publish()  # a warm-up's sums are weights
            self.progress(name, done, total)
        for index in range(done, total):
            yield index
            self.progress(name, index + 1, total)
            if self.saved:
                self.saved.save(name, index + 1, total, sums)

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

    def warm_up(self, batches: Sequence[np.ndarray]) -> None:
        """Trains the always-trained part over ``batches``: behind a head that has not learned gradients mean nothing.

        Always over the batches whose gradient is wanted next. It is then that of the loss which training reaches with
        the head trained along (the envelope theorem), free of all that the head can express itself, such as how
        frequent the classes happen to be among just these examples. With the halves of the calibration behind one head
        that noise points the same way in every layer, and more so for the optimum of both together, where their
        gradients are opposite. Slopes of MiniLM's tensors on CoLA, summed, and the share that is positive: one head
        trained over both halves -8.6, 0.11; over half A -0.8, 0.61; over other examples -6.1, 0.19; each half behind
        its own 1.0, 0.66.
        """
        if not self.warmup_steps:
            return
        for step in self.steps("warm-up", self.warmup_steps, self.shards.trained_state()):
            losses, _ = self._losses(batches[step % len(batches)], sampled_labels=False)
            # Falling to zero: a head still swinging about its optimum asks every layer to shift all logits alike.
            self.shards.train_step(losses, WARMUP_LEARNING_RATE * (1 - step / self.warmup_steps))

    def unreached(self) -> tuple[str, ...]:
        """The candidates and always-trained parameters that no batch of the calibration gives a gradient. Collective.

        Passes over gradients have seen whole halves; otherwise one batch usually shows that all are reached. Experts
        that no token of a batch is routed to need another one.
        """
        unseen = [batch for batch in self.calibration.batches if int(batch[0]) not in self.seen]
        missing = self._unreached()
        for index, batch in enumerate(unseen):
            if not missing:
                break
            losses, _ = self._losses(batch, sampled_labels=False)
            with self.shards.gradients(losses):
                pass
            missing = self._unreached()
            self.progress("reach", index + 1, len(unseen))
        return missing

    def _unreached(self) -> tuple[str, ...]:
        names = self.shards.names
        reached = torch.tensor([name in self.shards.reached for name in names], dtype=torch.int64)
        return tuple(
            name for name, ranks in zip(names, self.shards.ranks.all_reduce(reached), strict=True) if not ranks
        )

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
