"""Passes over the calibration: a gradient for each global batch, at true or at sampled labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from adapeft.data.batches import Calibration
from adapeft.errors import AdapeftError
from adapeft.finite import blame, is_finite
from adapeft.measure.partial import PartialSums
from adapeft.measure.shards import Shards
from adapeft.tasks.losses import Collate, Watched, example_losses, micro_losses
from adapeft.tasks.objective import Objective

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
        source: where the examples are from, for messages.

    Every pass raises ``AdapeftError`` on all ranks at the first batch whose loss, or whatever is summed over the
    batches, is not finite; nothing of that batch is saved.
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
    source: str = "data.train"

    def gradients(
        self, name: str, batches: Sequence[np.ndarray], sums: Sequence[Tensor], *, sampled_labels: bool = False
    ) -> Iterator[tuple[list[Tensor], int]]:
        """For each global batch its mean-loss gradient (a tensor a slice) and the number of predictions in the mean.

        ``sums`` are all that the caller adds up of them, in place: where an interrupted measurement is taken up, they
        hold the batches that were done, and the others follow.
        """
        for index in self.steps(name, len(batches), sums):
            watched, num_predictions = self._losses(batches[index], sampled_labels=sampled_labels)
            self.seen.add(int(batches[index][0]))
            with self.shards.gradients(watched.losses) as gradients:
                yield gradients, num_predictions
            self._check(name, batches[index], watched, sums, sampled_labels=sampled_labels)

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
            watched, num_predictions = self._losses(batch, sampled_labels=False)
            total += self.shards.loss(watched.losses) * num_predictions
            self._check("losses", batch, watched, ())
            weight += num_predictions
        return total / weight

    @contextmanager
    def training_gradients(self, batch: np.ndarray, learning_rate: float) -> Iterator[list[Tensor]]:
        """The candidates' gradients for a global batch; on leaving, the always-trained part steps on the same batch."""
        watched, _ = self._losses(batch, sampled_labels=False)
        with self.shards.gradients(watched.losses) as gradients:
            self._check("probe", batch, watched, gradients)
            yield gradients
        self.shards.train_step(watched.losses, learning_rate)

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
        state = self.shards.trained_state()
        for step in self.steps("warm-up", self.warmup_steps, state):
            batch = batches[step % len(batches)]
            watched, _ = self._losses(batch, sampled_labels=False)
            before = [tensor.detach().clone() for tensor in state]
            # Falling to zero: a head still swinging about its optimum asks every layer to shift all logits alike.
            self.shards.train_step(watched.losses, WARMUP_LEARNING_RATE * (1 - step / self.warmup_steps))
            self._check("warm-up", batch, watched, state, partial(self._put_back, state, before))

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
            watched, _ = self._losses(batch, sampled_labels=False)
            with self.shards.gradients(watched.losses):
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

    def _losses(self, batch: np.ndarray, *, sampled_labels: bool) -> tuple[Watched, int]:
        losses, num_predictions = micro_losses(
            batch,
            self.collate,
            self.objective,
            self.shards.ranks,
            self.shards.num_micro,
            self.shards.device,
            self.seed if sampled_labels else None,
        )
        return Watched(losses), num_predictions

    @torch.no_grad()
    def _put_back(self, state: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        self.shards.publish()

    def _check(
        self,
        name: str,
        batch: np.ndarray,
        watched: Watched,
        sums: Sequence[Tensor],
        undo: Callable[[], None] = lambda: None,
        *,
        sampled_labels: bool = False,
    ) -> None:
        """Raises ``AdapeftError`` on all ranks where the loss of ``batch``, or what is summed, is not finite.

        ``undo`` puts back the weights that gave the loss, where they have been stepped since.
        """
        overflown = sum(not is_finite(total) for total in sums)
        found = torch.tensor([watched.total(), overflown], dtype=torch.float64)
        loss, overflown = self.shards.ranks.all_reduce(found).tolist()
        if math.isfinite(loss) and not overflown:
            return
        undo()
        examples = example_losses(
            batch,
            self.collate,
            self.objective,
            self.shards.device,
            lambda one: self.shards.loss([one]) / self.shards.ranks.world_size,
            self.seed if sampled_labels else None,
        )
        subject = (
            f"the loss of a calibration batch is {loss:g}"
            if not math.isfinite(loss)
            else f"the loss of a calibration batch is {loss:.3g}, and its gradient, or the square of that, is too "
            f"large for float32"
        )
        raise AdapeftError(
            f"measuring ({name}): {subject}. {blame(examples, self.source)} Correct or drop such examples; regression "
            f"targets belong on a scale of about 1. If the weights are at fault, the base model is damaged, or "
            f"select.probe_learning_rate is too high, or model.dtype: float32 is needed."
        )
