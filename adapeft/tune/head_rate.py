"""The learning rate of a new head, from the size of what it reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapeft.errors import AdapeftError
from adapeft.model.input_sizes import InputSizes, reading_inputs
from adapeft.model.structure import is_linear_layer
from adapeft.tune.attachment import attachment_of

_STEP = 0.6
"""Change of an output of a head by one step of Adam whose components all push it the same way.

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
    with reading_head(model) as sizes:
        if not sizes.layers:
            raise AdapeftError(
                "head_learning_rate: the attached subset has no new linear layer. Leave this argument of "
                "parameter_groups out."
            )
        for batch in batches:
            model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
    return rate_of_head(sizes)


def rate_of_head(sizes: InputSizes) -> float:
    """Return the rate of ``head_learning_rate`` for a head that has been run.

    Raises:
        AdapeftError: the head reads only zeros or values that are not finite.
    """
    for layer in sizes.layers:
        if not 0 < sizes.mean(layer) < math.inf:
            raise AdapeftError(
                f"head_learning_rate: the mean size of the inputs of {layer!r} is {sizes.mean(layer):g}, from which no "
                "rate follows. Check the base model, or give a number (in a config, train.head_learning_rate)."
            )
    return sizes.learning_rate(_STEP)


@contextmanager
def reading_head(model: nn.Module) -> Iterator[InputSizes]:
    """Yield the sizes of what the new head of an attached model reads, in evaluation mode and without gradients."""
    attachment = attachment_of(model)
    owners = {name: attachment.owners[name][""] for name in attachment.subset.new}
    layers = {
        name: owner.module for name, owner in owners.items() if owner.name == "weight" and is_linear_layer(owner.module)
    }
    modes = {module: module.training for module in model.modules()}  # some may be in another mode than the model
    model.eval()
    try:
        with reading_inputs(model, layers) as sizes, torch.no_grad():
            yield sizes
    finally:
        for module, is_training in modes.items():
            module.training = is_training
