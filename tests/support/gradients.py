"""Counts the gradients that are alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn


class LiveGradients:
    """Elements of the gradients that exist, from the moment a backward pass has one until its memory is freed.

    Attributes:
        peak: largest number of elements at once.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._live = 0
        self.peak = 0
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._born)

    def _born(self, parameter: Tensor) -> None:
        size = parameter.grad.numel()
        self._change(size)
        weakref.finalize(parameter.grad.untyped_storage(), self._change, -size)

    def _change(self, size: int) -> None:
        self._live += size
        self.peak = max(self.peak, self._live)
