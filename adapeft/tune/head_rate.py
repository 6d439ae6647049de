"""The learning rate of a new head, from the size of what it reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapeft.errors import AdapeftError
from adapeft.tune.attachment import attachment_of

_STEP = 0.6
"""Change of an output of the head by one step of Adam whose components all push it the same way.

Inputs of heads differ in size: MiniLM's pooled output has a mean L1 norm of 21, the last token of SmolLM2-135M 603.
Heads alone, trained on frozen features of the demo's docstrings (131 steps of 32), are best at 0.1 or above and at
3e-3 to 1e-2, where a step is 2 to 6. Next to a subset, MiniLM (seed 0) has with steps of 0.2, 0.6 and 2 on the
docstrings: elements drawn at 0.5 % 0.632, 0.637, 0.636, LoRA 0.591, 0.612, 0.614, everything trained 0.636, 0.658, –;
LoRA on STS-B 0.812, 0.819, –, and on MRPC after one epoch 0.766, 0.764, –.
"""


def head_learning_rate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    r"""Return a learning rate for the new head of an attached model, for ``parameter_groups``.

    A head starts from random values, and its best rate depends on its inputs, not on the subset. A step of Adam at rate
    η moves an output of a linear layer by up to :math:`\eta\|x\|_1`, which grows with the width of the model, as in μP
    (Yang and Hu, "Tensor Programs V", 2022, table 3). The rate is :math:`0.6 / \overline{\|x\|_1}`, the smallest over
    the new linear layers if the head has several. Padding does not count.

    Args:
        model: model with an attached subset that has a new head, before training.
        batches: batches as for ``adapeft.select``; one or two are enough.

    Raises:
        AdapeftError: the subset has no new head, or the head reads only zeros or values that are not finite.
    """
    device = next(model.parameters()).device
    with reading_head(model) as read:
        if not read.layers:
            raise AdapeftError(
                "head_learning_rate: the attached subset has no new linear layer. Leave this argument of "
                "parameter_groups out."
            )
        for batch in batches:
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            read.mask = inputs.get("attention_mask")
            model(**inputs)
    return read.learning_rate()


class HeadInputs:
    """Mean L1 norms of the inputs of new linear layers.

    Attributes:
        layers: names of the layers' weights.
        mask: mask of the tokens of the batch that runs, [n, T]; None: every position counts.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self.layers = tuple(layers)
        self.mask: Tensor | None = None
        self._sums = dict.fromkeys(self.layers, (0.0, 0))

    def add(self, name: str, inputs: Tensor) -> None:
        """Count the inputs of a layer, [..., features]."""
        norms = inputs.abs().sum(-1, dtype=torch.float32)
        if self.mask is not None and self.mask.shape == norms.shape:  # inputs of tokens, not of whole examples
            norms = norms[self.mask.bool()]
        total, count = self._sums[name]
        self._sums[name] = total + float(norms.sum(dtype=torch.float64)), count + norms.numel()

    def learning_rate(self) -> float:
        """Return the rate of ``head_learning_rate``; there is a layer, and it has been run."""
        return _STEP / max(self._mean(name) for name in self.layers)

    def _mean(self, name: str) -> float:
        total, count = self._sums[name]
        mean = total / count if count else 0.0
        if not 0 < mean < math.inf:
            raise AdapeftError(
                f"head_learning_rate: the mean size of the inputs of {name!r} is {mean:g}, from which no rate follows. "
                "Check the base model, or give a number (in a config, train.head_learning_rate)."
            )
        return mean


@contextmanager
def reading_head(model: nn.Module) -> Iterator[HeadInputs]:
    """Yield the inputs of the new head of an attached model over forward passes in evaluation mode, without gradients.

    The passes may be those of an engine around the model.
    """
    attachment = attachment_of(model)
    owners = {name: attachment.owners[name][""] for name in attachment.subset.new}
    layers = {
        name: owner.module
        for name, owner in owners.items()
        if owner.name == "weight" and isinstance(owner.module, nn.Linear | Conv1D)
    }
    found = HeadInputs(layers)
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(partial(_read, found, name))
            stack.callback(hook.remove)
        stack.callback(model.train, model.training)
        stack.enter_context(torch.no_grad())
        model.eval()
        yield found


def _read(found: HeadInputs, name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
    found.add(name, given[0])
