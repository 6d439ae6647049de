"""Interface through which measuring accesses parameters: one rank's slice of each, and the group of ranks.

``WholeModel`` implements it for one process that holds the whole model, ``cluster.zero.shards.ZeroShards`` for any ZeRO
stage. Nothing else in ``measure`` depends on which of the two is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from adapeft.ranks import OneRank, Ranks
from adapeft.tasks.losses.micro_batches import Loss


@dataclass(frozen=True)
class Slice:
    """Elements ``start`` to ``start + length`` of the flattened candidate ``groups.parameters[parameter]``."""

    parameter: int
    start: int
    length: int


class Shards(Protocol):
    """One rank's view of the model while it is measured."""

    ranks: Ranks
    device: torch.device
    num_micro: int
    """Number of micro-batches over which every gradient is accumulated, the same on all ranks."""
    slices: tuple[Slice, ...]
    """This rank's elements, at most one slice per candidate; over all ranks every element occurs exactly once."""
    names: tuple[str, ...]
    """The candidates, then the always-trained parameters."""

    @property
    def reached(self) -> set[str]:
        """Those of ``names`` that have received a gradient on this rank, even one of zeros."""
        ...

    def gradients(self, losses: Sequence[Loss]) -> AbstractContextManager[list[Tensor]]:
        """Yield float32 gradients of the sum of ``losses`` over all ranks, aligned with ``slices``. Collective.

        They are valid only within the context. ``losses`` are this rank's ``num_micro`` micro-batches, as functions of
        the model.
        """
        ...

    def loss(self, losses: Sequence[Loss]) -> float:
        """Return the sum of ``losses`` over all ranks and micro-batches, without gradients. Collective."""
        ...

    def weights(self) -> list[Tensor]:
        """Return copies of this rank's elements, float32 (float64 if the model is), aligned with ``slices``."""
        ...

    def write(self, candidates: Sequence[int], values: Mapping[int, Tensor]) -> None:
        """Set candidates on all ranks. Values from ``weights`` restore them bit for bit. Collective.

        Args:
            candidates: indices of the candidates to set, the same on all ranks.
            values: candidate → this rank's elements of it [slice.length], for every candidate of which this rank has a
                slice.
        """
        ...

    def train_step(self, losses: Sequence[Loss], learning_rate: float) -> None:
        """Take one AdamW step of the always-trained parameters on the same sum of losses. Collective."""
        ...

    def trained_state(self) -> list[Tensor]:
        """Return the live tensors that ``train_step`` changes on this rank: values, moments and step counts."""
        ...

    def publish(self) -> None:
        """Make the model compute with the values written into ``trained_state``. Collective."""
        ...


class WholeModel:
    """Shards of one process that holds the whole model: every slice is a whole parameter."""

    def __init__(
        self, model: nn.Module, candidates: Sequence[str], always_train: Sequence[str] = (), num_micro: int = 1
    ) -> None:
        parameters = dict(model.named_parameters())
        self.model = model
        self.ranks: Ranks = OneRank()
        self.num_micro = num_micro
        self.names = (*candidates, *always_train)
        self.reached: set[str] = set()
        self._candidates = [parameters[name] for name in candidates]
        self._always = [parameters[name] for name in always_train]
        self._optimizer = torch.optim.AdamW(self._always, weight_decay=0.0) if self._always else None
        self.device = next(model.parameters()).device
        self.slices = tuple(Slice(index, 0, parameter.numel()) for index, parameter in enumerate(self._candidates))

    @contextmanager
    def gradients(self, losses: Sequence[Loss]) -> Iterator[list[Tensor]]:
        """See ``Shards.gradients``."""
        self._backward(losses, [*self._candidates, *self._always])
        gradients = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten().float()
            for parameter in self._candidates
        ]
        yield gradients
        gradients.clear()  # the caller's loop keeps the list, and so its memory, during the next batch
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss(self, losses: Sequence[Loss]) -> float:
        """See ``Shards.loss``."""
        return sum(float(loss(self.model)) for loss in losses)

    def weights(self) -> list[Tensor]:
        """See ``Shards.weights``."""
        return [
            parameter.detach().flatten().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for parameter in self._candidates
        ]

    @torch.no_grad()
    def write(self, candidates: Sequence[int], values: Mapping[int, Tensor]) -> None:
        """See ``Shards.write``."""
        for candidate in candidates:
            parameter = self._candidates[candidate]
            parameter.copy_(values[candidate].view_as(parameter))

    def train_step(self, losses: Sequence[Loss], learning_rate: float) -> None:
        """See ``Shards.train_step``."""
        if self._optimizer is None:
            return
        self._backward(losses, self._always)
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def trained_state(self) -> list[Tensor]:
        """See ``Shards.trained_state``."""
        if self._optimizer is None:
            return []
        moments = [adam_state(self._optimizer, parameter) for parameter in self._always]
        return [*self._always, *(tensor for state in moments for tensor in state.values())]

    def publish(self) -> None:
        """See ``Shards.publish``. Does nothing, because ``trained_state`` holds the model's own weights."""

    def _backward(self, losses: Sequence[Loss], trainable: Sequence[nn.Parameter]) -> None:
        self.model.zero_grad(set_to_none=True)
        self.model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for loss in losses:
            loss(self.model).backward()
        for name, parameter in zip(self.names, [*self._candidates, *self._always], strict=True):
            if parameter.grad is not None:
                self.reached.add(name)


def adam_state(optimizer: torch.optim.Optimizer, stepped: Tensor) -> dict[str, Tensor]:
    """Return the Adam state of a tensor of ``optimizer``; before the first step, create its initial state."""
    state: dict[str, Tensor] = optimizer.state[stepped]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(stepped, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(stepped, memory_format=torch.preserve_format)
    return state
