"""Passes over the calibration: one gradient per global batch, at true or sampled labels."""

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
from adapeft.measure.shards.arriving import Receiver, Take
from adapeft.measure.shards.shards import Shards
from adapeft.tasks.losses.micro_batches import (
    Collate,
    Watched,
    example_losses,
    micro_losses,
    micro_pairs,
    watched_pairs,
)
from adapeft.tasks.losses.objective import MeanLoss

Progress = Callable[[str, int, int], None]
"""Callback that receives the name of a pass, the number of batches done and the total number of batches."""

Fold = Callable[[int, Tensor, int], None]
"""Callback that receives the index of a slice, its gradient of a batch's mean loss and the batch's prediction count."""

WARMUP_LEARNING_RATE = 3e-3
"""Highest peak of AdamW's learning rate in the warm-up of the always-trained part.

While a head has not yet learned the class frequencies, their gradient appears in every layer. Measured on CoLA (MiniLM,
512 examples): after 32 steps at a constant 1e-3 the pooler took 72 % of the budget for a predicted decrease of 0.15;
after 96 steps with a rate falling from 3e-3 it took nothing, and the predicted decrease was 0.0045.

Linear layers with large inputs, such as the heads of large decoders, have a lower rate: see ``_WARMUP_STEP``.
"""

_WARMUP_STEP = 2.0
"""Largest change of an output of always-trained linear layers by one step of a warm-up; see ``InputSizes``.

At 3e-3 a step changes outputs by 0.06 on MiniLM and by 1.8 on SmolLM2-135M, which is as it should be, but by more than
10 if the mean L1 norm of a head's inputs exceeds 3,300. Loss of half A of the demo's docstrings (256 examples) before,
at its highest in, and after 24 steps of a head on SmolLM2 by the change of an output: 0.6: 2.46, 2.46, 1.74; 2: 2.46,
2.50, 1.28; 6: 2.46, 5.97, 1.18; 20: 2.46, 23.7, 2.28; 60: 2.46, 72.0, 5.25. MiniLM's are within 0.1 of these at 2, and
rise in the same way.
"""

_READ = 8
"""Number of examples that determine the sizes of the inputs."""


@dataclass(frozen=True)
class Passes:
    """Passes of one measurement over its calibration, run through shards.

    Every pass raises ``AdapeftError`` on all ranks at the first batch whose loss, or a sum over the batches, is not
    finite; sums that include that batch are not saved.

    Attributes:
        collate: function from example indices to a micro-batch.
        seed: random seed of the sampled labels.
        warmup_steps: number of steps of every warm-up.
        saved: partial sums on disk, from which passes resume; None saves nothing.
        seen: first example of each batch whose gradient was computed.
        source: source of the examples, for messages.
    """

    shards: Shards
    objective: MeanLoss
    calibration: Calibration
    collate: Collate
    seed: int
    progress: Progress = lambda name, done, total: None
    warmup_steps: int = 0
    saved: PartialSums | None = None
    seen: set[int] = field(default_factory=set)
    source: str = "data.train"

    def predicting(self, batches: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Return those of ``batches`` that contain a prediction; the others have no weight in any mean."""
        return tuple(batch for batch in batches if self.objective.num_predictions(self.collate(batch).labels))

    def gradients(
        self, name: str, batches: Sequence[np.ndarray], sums: Sequence[Tensor], *, sampled_labels: bool = False
    ) -> Iterator[tuple[list[Tensor], int]]:
        """Yield, for each global batch, the gradient of its mean loss (one tensor per slice) and its prediction count.

        ``sums`` are all tensors into which the caller accumulates, in place. When an interrupted measurement resumes,
        they are loaded with the sums of the finished batches, and only the remaining batches follow.
        """
        for index in self.steps(name, len(batches), sums):
            watched, num_predictions = self._losses(batches[index], sampled_labels=sampled_labels)
            self.seen.add(int(batches[index][0]))
            with self.shards.gradients(watched.losses) as gradients:
                yield gradients, num_predictions
            self._check(name, batches[index], watched, sums, sampled_labels=sampled_labels)

    def fold(
        self,
        name: str,
        batches: Sequence[np.ndarray],
        sums: Sequence[Tensor],
        take: Fold,
        *,
        sampled_labels: bool = False,
        is_linear: bool = False,
    ) -> Iterator[int]:
        """Fold gradients into ``sums`` one parameter at a time, and yield each batch's prediction count afterwards.

        Unlike ``gradients``, this holds no gradient but that of the parameter being folded, and what ``take`` keeps.

        Args:
            name: name of the pass.
            batches: global batches.
            sums: as for ``gradients``.
            take: callback that receives the index of a slice, its gradient of the batch's mean loss and the prediction
                count, in any order of the slices and not at all for those without a gradient.
            sampled_labels: whether labels are sampled from the model.
            is_linear: whether ``take`` may be called for the parts of a gradient from micro-batches. Otherwise more
                than one micro-batch takes as much memory as ``gradients``.
        """
        for index in self.steps(name, len(batches), sums):
            watched, num_predictions = self._losses(batches[index], sampled_labels=sampled_labels)
            self.seen.add(int(batches[index][0]))
            self.shards.arriving(watched.losses, _counted(take, num_predictions), by_micro_batch=is_linear)
            yield num_predictions
            self._check(name, batches[index], watched, sums, sampled_labels=sampled_labels)

    def fold_both(
        self,
        name: str,
        batches: Sequence[np.ndarray],
        sums: Sequence[Tensor],
        true: Fold,
        sampled: Fold,
        prepare: Sequence[Callable[[], None]] = (),
    ) -> Iterator[int]:
        """Fold each batch's gradients at true and then at sampled labels, which share a forward pass where possible.

        Args:
            name: name of the pass.
            batches: global batches.
            sums: as for ``gradients``.
            true: callback for the gradients at true labels, as ``take`` of ``fold``, which is called for the parts of a
                gradient from micro-batches.
            sampled: the same for those at sampled labels.
            prepare: functions that are called before the backward pass at true and at sampled labels, if any.
        """
        for index in self.steps(name, len(batches), sums):
            pairs, num_predictions = micro_pairs(
                batches[index],
                self.collate,
                self.objective,
                self.shards.ranks,
                self.shards.num_micro,
                self.shards.device,
                self.seed,
            )
            pairs, watched = watched_pairs(pairs)
            self.seen.add(int(batches[index][0]))
            receivers = [Receiver(_counted(take, num_predictions)) for take in (true, sampled)]
            for place, function in enumerate(prepare):
                receivers[place] = receivers[place]._replace(prepare=function)
            self.shards.arriving_both(pairs, receivers)
            yield num_predictions
            for labels, values in enumerate(watched):
                self._check(name, batches[index], values, () if labels else sums, sampled_labels=bool(labels))

    def steps(self, name: str, total: int, sums: Sequence[Tensor]) -> Iterator[int]:
        """Yield the remaining steps of a pass; ``sums`` as for ``gradients``. Collective."""
        done = self.saved.begin(name, sums) if self.saved else 0
        if done:
            self.shards.publish()  # the sums of a warm-up are weights
            self.progress(name, done, total)
        for index in range(done, total):
            yield index
            self.progress(name, index + 1, total)
            if self.saved:
                self.saved.save(name, index + 1, total, sums)

    def loss(self, batches: Sequence[np.ndarray]) -> float:
        """Return the mean loss over all predictions of ``batches``, without gradients. Collective."""
        total, weight = 0.0, 0
        for batch in batches:
            watched, num_predictions = self._losses(batch, sampled_labels=False)
            total += self.shards.loss(watched.losses) * num_predictions
            self._check("losses", batch, watched, ())
            weight += num_predictions
        return total / weight

    @contextmanager
    def training_gradients(self, batch: np.ndarray, learning_rate: float) -> Iterator[list[Tensor]]:
        """Yield the candidates' gradients for a batch; on exit, train the always-trained part on it for one step."""
        watched, _ = self._losses(batch, sampled_labels=False)
        with self.shards.gradients(watched.losses) as gradients:
            self._check("probe", batch, watched, gradients)
            yield gradients
        self.shards.train_step(watched.losses, learning_rate)

    def warm_up(self, batches: Sequence[np.ndarray]) -> None:
        """Train the always-trained part over ``batches``, because gradients behind an untrained head are meaningless.

        ``batches`` must be those whose gradient is needed next. By the envelope theorem it is then the gradient of the
        loss with the head optimized along, without anything that the head itself can express, such as the class
        frequencies of these examples. If both halves of the calibration share one head, that noise points the same way
        in every layer, and even more at the joint optimum of both halves, where their gradients are opposite. Sum of
        the slopes of MiniLM's tensors on CoLA, and the fraction that is positive: one head trained over both halves
        -8.6, 0.11; over half A -0.8, 0.61; over other examples -6.1, 0.19; one head per half 1.0, 0.66.
        """
        if not self.warmup_steps:
            return
        peak = self._warmup_rate(batches[0])
        state = self.shards.trained_state()
        for step in self.steps("warm-up", self.warmup_steps, state):
            batch = batches[step % len(batches)]
            watched, _ = self._losses(batch, sampled_labels=False)
            before = [tensor.detach().clone() for tensor in state]
            # The rate falls to zero: if the head still oscillates about its optimum, every layer's gradient shifts all
            # logits alike.
            self.shards.train_step(watched.losses, peak * (1 - step / self.warmup_steps))
            self._check("warm-up", batch, watched, state, partial(self._put_back, state, before))

    def _warmup_rate(self, batch: np.ndarray) -> float:
        """Return the peak learning rate of a warm-up that begins with ``batch``.

        Every rank reads the same examples, one at a time, so all find the same rate.
        """
        with self.shards.trained_inputs() as sizes:
            for index in batch[:_READ]:
                micro = self.collate(np.array([index])).to(self.shards.device)
                self.shards.loss([partial(self.objective.loss, batch=micro)])
        return min(WARMUP_LEARNING_RATE, sizes.learning_rate(_WARMUP_STEP))

    def unreached(self) -> tuple[str, ...]:
        """Return the candidates and always-trained parameters that get no gradient from any batch. Collective.

        Gradient passes have already seen whole halves of the calibration. Otherwise one batch usually reaches all
        parameters; experts to which none of its tokens is routed need further batches.
        """
        unseen = [batch for batch in self.calibration.batches if int(batch[0]) not in self.seen]
        missing = self._unreached()
        for index, batch in enumerate(unseen):
            if not missing:
                break
            watched, _ = self._losses(batch, sampled_labels=False)
            self.shards.reach(watched.losses)
            missing = self._unreached()
            self.progress("reach", index + 1, len(unseen))
        return missing

    def _unreached(self) -> tuple[str, ...]:
        names, own = self.shards.names, self.shards.reached
        reached = torch.tensor([name in own for name in names], dtype=torch.int64)
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
        """Raise ``AdapeftError`` on all ranks if the loss of ``batch`` or one of ``sums`` is not finite.

        ``undo`` restores the weights that gave the loss, if they have changed since.
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
            else f"the loss of a calibration batch is {loss:.3g}, but its gradient or squared gradient is too large "
            f"for float32"
        )
        raise AdapeftError(
            f"measuring ({name}): {subject}. {blame(examples, self.source)} Correct or drop such examples; scale "
            f"regression targets to about 1. If the weights are at fault, the base model is damaged, "
            f"select.probe_learning_rate is too high, or model.dtype must be float32."
        )


def _counted(take: Fold, num_predictions: int) -> Take:
    return lambda place, gradient: take(place, gradient, num_predictions)
