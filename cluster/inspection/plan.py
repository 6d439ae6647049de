"""The training plan: steps and learning rates, known before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from adapeft.errors import AdapeftError, did_you_mean
from adapeft.sections.train import Train

ASSUMED_RATE = 1e-3
"""Learning rate of the reach of a first choice with ``train.learning_rate: auto``, before any was tried."""

_PLANNED = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
"""Parameters of the schedules of transformers that the plan gives."""


@dataclass(frozen=True)
class TrainingPlan:
    """Number of steps and learning-rate schedule of a training.

    Attributes:
        num_steps: number of optimizer steps.
        interval: steps between evaluations, and between checkpoints, for which the config gives no number.
        train: the config's ``train`` section.
    """

    num_steps: int
    interval: int
    train: Train

    @property
    def peak(self) -> float:
        """Peak learning rate; with ``train.learning_rate: auto``, the one that is assumed before a rate is found."""
        rate = self.train.learning_rate
        return ASSUMED_RATE if rate == "auto" else rate

    def shortened(self, num_steps: int) -> TrainingPlan:
        """Return the same schedule over fewer steps; numbers of steps among its options shrink with it."""
        share = num_steps / self.num_steps
        options = {
            name: max(1, round(value * share)) if name.endswith("_steps") and isinstance(value, int) else value
            for name, value in self.train.lr_scheduler_kwargs.items()
        }
        return replace(self, num_steps=num_steps, train=self.train.model_copy(update={"lr_scheduler_kwargs": options}))

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        """Return the transformers schedule that ``train.lr_scheduler_type`` names.

        Raises:
            AdapeftError: the schedule has no such ``train.lr_scheduler_kwargs``, refuses their values or needs others,
                or it has no warmup and ``train.warmup_ratio`` is not 0.
        """
        name, options = self.train.lr_scheduler_type, self.train.lr_scheduler_kwargs
        if name == "constant" and self.train.warmup_ratio:
            raise AdapeftError(
                f"train.lr_scheduler_type = constant: has no warmup, but train.warmup_ratio is "
                f"{self.train.warmup_ratio:g}. Set warmup_ratio: 0, or lr_scheduler_type: constant_with_warmup."
            )
        make: Callable[..., LambdaLR] = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]  # type: ignore[assignment]
        known = sorted(signature(make).parameters.keys() - _PLANNED)
        for option in options.keys() - known:
            has = f"options: {', '.join(known)}" if known else "no options"
            raise AdapeftError(
                f"train.lr_scheduler_kwargs = {options}: {option!r} is no option of the schedule {name}, which has "
                f"{has}.{did_you_mean(option, known)}"
            )
        try:
            return get_scheduler(
                name,
                optimizer,
                num_warmup_steps=math.ceil(self.train.warmup_ratio * self.num_steps),
                num_training_steps=self.num_steps,
                scheduler_specific_kwargs=options,
            )
        except (TypeError, ValueError, ArithmeticError) as error:
            raise self._refused(str(error)) from error

    def learning_rates(self) -> list[float]:
        """Return the learning rate of every step.

        Raises:
            AdapeftError: a learning rate is negative or not finite, or see ``schedule``.
        """
        peak = self.peak
        (factor,) = self.schedule(torch.optim.SGD([torch.zeros(1)], lr=peak)).lr_lambdas
        try:
            rates = [float(peak * factor(step)) for step in range(self.num_steps)]
        except (TypeError, ValueError, ArithmeticError) as error:
            raise self._refused(str(error)) from error
        for step, rate in enumerate(rates):
            if not 0 <= rate < math.inf:
                raise self._refused(f"the learning rate of step {step + 1} would be {rate:g}")
        return rates

    def _refused(self, reason: str) -> AdapeftError:
        return AdapeftError(
            f"train.lr_scheduler_kwargs = {self.train.lr_scheduler_kwargs}: {self.train.lr_scheduler_type} refuses "
            f"them: {reason.rstrip('.')}. Correct them, or name another train.lr_scheduler_type."
        )


_STREAMED_INTERVAL = 500
"""``interval`` where epochs are unknown; the ``save_steps`` of transformers' Trainer."""


def plan_training(train: Train, num_examples: int | None) -> TrainingPlan:
    """Return the plan for ``num_examples`` training examples; None: a stream, for which ``train`` has ``max_steps``."""
    if num_examples is None:
        assert train.max_steps is not None, "the config was checked"
        return TrainingPlan(train.max_steps, _STREAMED_INTERVAL, train)
    steps_per_epoch = math.ceil(num_examples / train.batch_size)
    num_steps = train.max_steps or max(1, math.ceil(train.epochs * steps_per_epoch))
    return TrainingPlan(num_steps, steps_per_epoch, train)
