"""Which parameters the loss depends on, found on fake tensors: shapes without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel

from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.model.trial import MOST_OPERATIONS
from adapeft.model.unloaded.fake import to_fake
from adapeft.model.unloaded.unloaded import NeedsLoadingError
from adapeft.model.unloaded.weightless import Weightless
from adapeft.tasks.losses.objective import Objective


def unreached_without_weights(
    model: PreTrainedModel, weightless: Weightless, groups: Groups, batches: Iterable[Batch], objective: Objective
) -> tuple[str, ...]:
    """Return the candidates and always-trained parameters that get no gradient from any of the batches.

    The model runs forward and backward on fake tensors, so that its code and torch's autograd decide, as they do with
    weights. Stops at the first batch after which none is missing.

    Args:
        model: model on the meta device, in the mode in which it is measured. It is unusable afterwards.
        weightless: the mode in which it was built.
        groups: groups of its candidates.
        batches: the calibration.
        objective: the loss.

    Raises:
        NeedsLoadingError: the model's code needs a value that depends on its weights.
    """
    names = (*(info.name for info in groups.parameters), *groups.always_train)
    weightless.most_operations = 4 * MOST_OPERATIONS  # the backward pass takes about twice those of the forward pass
    model.requires_grad_(False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        to_fake(model, torch.float32, weightless)
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    missing = list(names)
    for batch in batches:
        with fake, weightless, torch.enable_grad(), torch.random.fork_rng(devices=[]):
            try:
                given = _known(batch, weightless)
                objective.loss_sum(objective.forward(model, given), given.labels).backward()
            except Exception as error:  # the model's own code may raise anything without weights
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise NeedsLoadingError(f"it does not run without weights ({reason})") from error
        missing = [name for name in missing if parameters[name].grad is None]
        model.zero_grad(set_to_none=True)
        if not missing:
            break
    return tuple(missing)


def check_reached(groups: Groups, unreached: Collection[str]) -> None:
    """Check that some candidate is not in ``unreached``.

    Raises:
        AdapeftError: the loss depends on no candidate.
    """
    if set(unreached) >= {info.name for info in groups.parameters}:
        raise AdapeftError(
            f"none of the {len(groups.parameters)} candidates, such as {groups.parameters[0].name!r}, received a "
            f"gradient from the calibration: the loss does not depend on them. Admit other parameters in "
            f"select.include and select.exclude."
        )


def _known(batch: Batch, weightless: Weightless) -> Batch:
    """Return the batch as fake tensors with known values."""
    inputs = {
        name: weightless.known(value, "cpu") if isinstance(value, Tensor) else value
        for name, value in batch.inputs.items()
    }
    return replace(batch, inputs=inputs, labels=weightless.known(batch.labels, "cpu"))
