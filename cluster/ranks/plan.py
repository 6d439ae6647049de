"""The training plan: steps and learning rates, known before anything is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from adapeft.sections.train import Train


@dataclass(frozen=True)
class TrainingPlan:
    """Number of steps and learning-rate schedule of a training."""

    num_steps: int
    steps_per_epoch: int
    train: Train

    def schedule(self, optimizer: Optimizer) -> LRScheduler:
        """Return the transformers schedule that ``train.lr_scheduler_type`` names."""
        return get_scheduler(
            "constant_with_warmup" if self.train.lr_scheduler_type == "constant" else self.train.lr_scheduler_type,
            optimizer,
            num_warmup_steps=math.ceil(self.train.warmup_ratio * self.num_steps),
            num_training_steps=self.num_steps,
        )

    def learning_rates(self) -> list[float]:
        """Return the learning rate of every step."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.train.learning_rate)
        schedule = self.schedule(optimizer)
        rates: list[float] = []
        for _ in range(self.num_steps):
            rates.append(float(schedule.get_last_lr()[0]))
            optimizer.step()
            schedule.step()
        return rates


def plan_training(train: Train, num_examples: int) -> TrainingPlan:
    """Return the plan for ``num_examples`` training examples."""
    steps_per_epoch = math.ceil(num_examples / train.batch_size)
    num_steps = train.max_steps or max(1, math.ceil(train.epochs * steps_per_epoch))
    return TrainingPlan(num_steps, steps_per_epoch, train)
