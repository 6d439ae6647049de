"""The optimizer steps of a training."""

from __future__ import annotations

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from torch import nn

from adapeft.tasks.losses.micro_batches import micro_losses
from cluster.inspection.plan import TrainingPlan
from cluster.ranks.inputs import Inputs, StepBatch
from cluster.zero.engine import DistributedRanks
from cluster.zero.leaves import follow_in_engine
from cluster.zero.steps import FiniteSteps, Step


class TrainingSteps:
    """Steps of an engine on the run's objective, each followed by the rule of the subset's method.

    Attributes:
        follower: applies the rule.
    """

    def __init__(
        self,
        inputs: Inputs,
        plan: TrainingPlan,
        engine: DeepSpeedEngine,
        model: nn.Module,
        ranks: DistributedRanks,
        done: int = 0,
    ) -> None:
        self.follower = follow_in_engine(engine, model, ranks, plan.num_steps, done)
        self._inputs, self._engine, self._ranks = inputs, engine, ranks
        self._steps = FiniteSteps(engine, ranks)

    def take(self, batch: StepBatch, done: int) -> Step:
        """Take a step on the mean loss of a batch, after ``done`` steps. Collective."""
        num_micro = self._engine.gradient_accumulation_steps()
        # Dropout is seeded by step and rank: a resumed run draws the same as an uninterrupted one.
        torch.manual_seed(_mixed(self._inputs.config.seed, done, self._ranks.rank))
        losses, _ = micro_losses(
            batch.indices, batch.collate, self._inputs.objective, self._ranks, num_micro, self._ranks.device
        )
        step = self._steps.take(losses)
        self.follower.after_step()  # its schedule counts skipped steps too
        return step


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
