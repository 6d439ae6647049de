"""Switching an attached delta off in place: the model computes as the pretrained one, without a second copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from adapeft.errors import AdapeftError
from adapeft.model.divided import is_divided, is_flattened
from adapeft.model.wrappers import unwrap
from adapeft.parts.layers.leaves import switch_leaves
from adapeft.parts.registry import by_kind
from adapeft.tune.attachment import Attachment, attachment_of
from adapeft.tune.buffers import changed_buffers, replaced_buffers


@contextmanager
def base(model: nn.Module) -> Iterator[None]:
    """Context in which a model with an attached subset computes as the pretrained model, such as a reference for DPO.

    Leaves, LoRA and adapters are left out, at no cost. Tensors that are trained whole, and buffers that training has
    changed, get their pretrained values, which ``attach`` keeps on the CPU: only these are copied to the device, and
    only for as long as the context lasts. New parameters, such as a head, have no pretrained values and keep their
    trained ones, as with ``adapeft.detach``.

    Gradients are off within the context: the subset takes no part in what is computed there. A graph that was recorded
    before the context can be walked backward after it, but not within it. The trained values come back after an
    exception too. A context within another one changes nothing, and the outer one ends it. Modules keep their mode
    (``train`` or ``eval``), so call ``model.eval()`` for a reference without dropout.

    Args:
        model: model after ``attach``, as it is or wrapped by a trainer.

    Raises:
        AdapeftError: nothing is attached, or a tensor that is trained whole is divided over ranks.
    """
    inner = unwrap(model)
    attachment = attachment_of(inner)
    with torch.no_grad():
        if attachment.is_off:
            yield
            return
        with ExitStack() as stack:
            stack.callback(_switch, inner, attachment, on=True)
            # Autocast keeps casts of parameters that require gradients: those of the values before.
            stack.callback(torch.clear_autocast_cache)
            stack.enter_context(_base_values(attachment))
            stack.enter_context(replaced_buffers(inner, _base_buffers(inner, attachment)))
            _switch(inner, attachment, on=False)
            torch.clear_autocast_cache()
            yield


def _switch(model: nn.Module, attachment: Attachment, *, on: bool) -> None:
    """Make the model compute with leaves, LoRA and adapters, or without them."""
    attachment.is_off = not on
    for kind, parts in by_kind(attachment.subset.parts):
        kind.switch(model, parts, on)
    for module in model.modules():
        switch_leaves(module, on)


@contextmanager
def _base_values(attachment: Attachment) -> Iterator[None]:
    """Context in which the tensors that are trained whole hold their pretrained values."""
    parameters = {name: attachment.pieces(name)[""] for name in attachment.base}
    for name, parameter in parameters.items():
        if how := is_divided(parameter) or "FullyShardedDataParallel" * is_flattened(parameter):
            raise AdapeftError(
                f"base: {name!r} is trained whole and divided over ranks ({how}), so its pretrained values cannot be "
                f"put in its place. Train rows, elements or LoRA, which can be switched off under any trainer, or load "
                f"the pretrained model a second time as the reference."
            )
    trained = {name: parameter.data for name, parameter in parameters.items()}
    try:
        # Data is exchanged, not copied into: copying would invalidate a graph that has saved the trained tensor.
        for name, parameter in parameters.items():
            parameter.data = attachment.base[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = trained[name]


def _base_buffers(model: nn.Module, attachment: Attachment) -> dict[str, Tensor]:
    """Return the values before training of the buffers that training has changed."""
    return {name: attachment.buffers[name] for name in changed_buffers(model, attachment.buffers)}
