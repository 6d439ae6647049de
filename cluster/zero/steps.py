"""Optimizer steps that are taken on all ranks if loss and gradient are finite, and otherwise on none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine

from adapeft.finite import is_finite
from adapeft.tasks.losses.micro_batches import Loss
from adapeft.tune.buffers import set_buffers, stored_buffers
from cluster.zero.engine import DistributedRanks, backward_of_sum


@dataclass(frozen=True)
class Step:
    """Result of a step.

    Attributes:
        loss: mean loss over the global batch.
        is_taken: whether the optimizer has stepped.
    """

    loss: float
    is_taken: bool

    @property
    def problem(self) -> str:
        """Reason why the step was not taken."""
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss:g}"
        return f"the gradient is not finite, at a loss of {self.loss:.4g}"


class FiniteSteps:
    """Steps of a training engine whose optimizer is a ``SkippableAdamW``.

    A skipped step leaves weights, moments, their step counts and running statistics unchanged. The learning-rate
    schedule still advances, so that neither the length of a run nor resuming depends on skipped steps. DeepSpeed itself
    silently skips a step whose gradient norm is not finite, and does not advance the schedule; at stage 0 in float32 it
    takes the step.
    """

    def __init__(self, engine: DeepSpeedEngine, ranks: DistributedRanks) -> None:
        self._engine, self._ranks = engine, ranks
        self._trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._checks_gradients = engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled()

    def take(self, losses: Sequence[Loss]) -> Step:
        """Take a step on the sum of ``losses`` over all ranks. Collective."""
        engine, optimizer, schedule = self._engine, self._engine.basic_optimizer, self._engine.lr_scheduler
        epoch, buffers = schedule.last_epoch, stored_buffers(engine.module)
        local = torch.zeros(2, dtype=torch.float64, device=self._ranks.device)
        for number, loss in enumerate(losses, start=1):
            part = loss(engine)
            local[0] += part.detach()
            backward_of_sum(engine, part)
            if number == len(losses):
                local[1] = float(self._checks_gradients and not self._has_finite_norm())
                mean, overflown = self._ranks.all_reduce(local).tolist()
                optimizer.skips = not math.isfinite(mean) or overflown > 0
            engine.step()
        is_taken = not optimizer.skips and engine.was_step_applied()
        optimizer.skips = False
        if not is_taken:
            set_buffers(engine.module, buffers)
        if schedule.last_epoch == epoch:
            schedule.step()
        return Step(mean, is_taken)

    def _has_finite_norm(self) -> bool:
        """Whether the norm of all gradients is finite, which is DeepSpeed's criterion with ZeRO."""
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        return not gradients or is_finite(torch.nn.utils.get_total_norm(gradients))
