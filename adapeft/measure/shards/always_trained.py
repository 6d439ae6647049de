"""AdamW of the always-trained parameters while a model is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class AlwaysTrained:
    """One rank's elements of the always-trained parameters and their AdamW, without weight decay.

    Attributes:
        values: the elements, float32 (float64 if the model is); views of the weights themselves if those are.

    Args:
        pieces: views of the weights.
    """

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.values = [piece.to(torch.promote_types(piece.dtype, torch.float32)) for piece in pieces]
        # An explicit parameter group, because a rank may hold no elements.
        self._optimizer = torch.optim.AdamW([{"params": self.values}], weight_decay=0.0)

    def add(self, place: int, gradient: Tensor) -> None:
        """Add to the gradient of the next step."""
        value = self.values[place]
        gradient = gradient.to(value)
        value.grad = gradient.clone() if value.grad is None else value.grad.add_(gradient)

    def step(self, learning_rate: float) -> None:
        """Step along the gradients that were added since the last step."""
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> list[Tensor]:
        """Return the live tensors that a step changes: values, moments and step counts."""
        moments = [adam_state(self._optimizer, value) for value in self.values]
        return [*self.values, *(tensor for state in moments for tensor in state.values())]


def adam_state(optimizer: torch.optim.Optimizer, stepped: Tensor) -> dict[str, Tensor]:
    """Return the Adam state of a tensor of ``optimizer``; before the first step, create its initial state."""
    state: dict[str, Tensor] = optimizer.state[stepped]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(stepped, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(stepped, memory_format=torch.preserve_format)
    return state
