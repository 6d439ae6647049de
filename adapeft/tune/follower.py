"""Application of a rule during training: gradients are edited before an optimizer step, leaves projected after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from adapeft.parts.rule import LeafShards, Rule


class Follower:
    """Applies a rule to the leaves that an optimizer updates.

    Args:
        rule: rule of the dense parts.
        leaves: this process's shards of the leaves.
        optimizer: optimizer of the leaves; it may update them in several calls.
        num_steps: number of steps of the whole training.
        step: number of steps already done, when training is resumed.
    """

    def __init__(self, rule: Rule, leaves: LeafShards, optimizer: Optimizer, num_steps: int, step: int = 0) -> None:
        self.rule, self.leaves, self.num_steps = rule, leaves, num_steps
        self.rule.step = step
        self._is_projected = False
        self._is_edited = False
        optimizer.register_step_pre_hook(self._edit_gradients)
        optimizer.register_step_post_hook(self._stepped)

    @property
    def is_ready(self) -> bool:
        """Whether the current state of training may be shipped."""
        return self.rule.is_ready(self.num_steps)

    def after_step(self) -> None:
        """Count an optimizer step, and project if the rule requires it. Collective."""
        self.rule.step += 1
        self._is_projected = self._is_edited = False
        if self.rule.projects_after(self.rule.step, self.num_steps):
            self._project()

    @contextmanager
    def as_shipped(self) -> Iterator[None]:
        """Context in which the leaves are projected to the budget, if the rule does so for evaluation. Collective.

        Afterwards training resumes from the values before, because evaluation must not affect it.
        """
        if self._is_projected or not self.rule.projects_to_evaluate:
            yield
            return
        before = [shard.values.clone() for shard in self.leaves.shards]
        self._project()
        yield  # without finally: publish is collective, and a failed rank would wait for the others
        if self.rule.step < self.num_steps:
            with torch.no_grad():
                for shard, values in zip(self.leaves.shards, before, strict=True):
                    shard.values.copy_(values)
            self.leaves.publish()
            self._is_projected = False

    def _project(self) -> None:
        self.rule.project(self.leaves)
        self.leaves.publish()
        self._is_projected = True

    def _edit_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Of a subclass whose step calls that of its base, torch runs the hooks twice once the process has created an
        # optimizer of the base class itself.
        if self._is_edited:
            return
        self._is_edited = True
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    gradient = flat.grad.view(-1)
                    for offset, shard in self.leaves.flats.get(id(flat), ()):
                        self.rule.edit_gradient(shard, gradient.narrow(0, offset, len(shard.values)))

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._is_edited = False
