"""Sizes of the inputs of linear layers, and the learning rate at which Adam moves the outputs by a given amount."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class InputSizes:
    """Mean L1 norms of the inputs of linear layers. Padding does not count.

    Attributes:
        layers: names of the layers' weights.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = tuple(layers)
        self._mask: Tensor | None = None
        self._sums = dict.fromkeys(self.layers, (0.0, 0))

    def mean(self, layer: str) -> float:
        """Return the mean L1 norm of a layer's inputs; 0 if it has not been run."""
        total, count = self._sums[layer]
        return total / count if count else 0.0

    def learning_rate(self, step: float) -> float:
        r"""Return the rate at which a step of Adam changes an output of the layers by at most ``step`` on average.

        A step at rate η changes an output of a linear layer by up to :math:`\eta\|x\|_1`, if all its components push it
        the same way. So the rate is :math:`s / \overline{\|x\|_1}`, the smallest of the layers; infinite if they have
        read nothing, or only zeros.
        """
        largest = max(map(self.mean, self.layers), default=0.0)
        return step / largest if largest else math.inf

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")

    def _add(self, layer: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        norms = args[0].detach().abs().sum(-1, dtype=torch.float32)
        if self._mask is not None and self._mask.shape == norms.shape:  # inputs of tokens, not of whole examples
            norms = norms[self._mask.bool()]
        total, count = self._sums[layer]
        self._sums[layer] = total + float(norms.sum(dtype=torch.float64)), count + norms.numel()


@contextmanager
def reading_inputs(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[InputSizes]:
    """Yield the sizes of what layers of ``model`` read in the forward passes within the context.

    The passes may be those of an engine around the model.

    Args:
        model: model, called with its attention mask by name.
        layers: name of its weight → linear layer.
    """
    sizes = InputSizes(layers)
    with ExitStack() as stack:
        hooks = [model.register_forward_pre_hook(sizes._begin, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(partial(sizes._add, name)) for name, layer in layers.items()]
        for hook in hooks:
            stack.callback(hook.remove)
        yield sizes
