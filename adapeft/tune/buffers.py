"""Buffers that training changes: running statistics of normalizations, codebooks, vectors of spectral norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adapeft.errors import AdapeftError
from adapeft.model.wrappers import name_inside


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return CPU copies of the buffers that a checkpoint of ``model`` holds, by name."""
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in _stored(model) if not buffer.is_meta}


def changed_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of ``stored_buffers`` whose values differ from ``before``, in the dtypes of ``before``.

    All buffers are compared, because no list of module types is complete: a forward pass in training mode may write to
    any of them.

    Raises:
        AdapeftError: the shape of a buffer has changed, so the value does not fit the base.
    """
    found = {}
    for name, buffer in _stored(model):
        if name not in before:
            continue
        if buffer.shape != before[name].shape:
            raise AdapeftError(
                f"the buffer {name!r} had shape {tuple(before[name].shape)} when the subset was attached and has "
                f"{tuple(buffer.shape)} now, which does not fit the base. Save the model with save_pretrained instead."
            )
        value = buffer.detach().cpu()
        # An engine may have cast the model since; this does not count as a change.
        if not torch.equal(value, before[name].to(value.dtype)):
            found[name] = value.to(before[name].dtype, copy=True)
    return found


@torch.no_grad()
def set_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into the buffers of these names."""
    for name, buffer in _stored(model):
        if name in values:
            buffer.copy_(values[name])


@contextmanager
def replaced_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which buffers hold ``values``; what forward passes write into them there is discarded with it."""
    own = {name: (buffer, buffer.data) for name, buffer in _stored(model) if name in values}
    try:
        for name, (buffer, value) in own.items():
            buffer.data = values[name].to(value.device, value.dtype, copy=True)
        yield
    finally:
        for buffer, value in own.values():
            buffer.data = value


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the base, buffer) of every persistent buffer.

    PEFT moves layers with LoRA below ``base_layer``, and trainers may have wrapped modules since ``attach``.
    """
    for path, module in model.named_modules():
        for local_name, buffer in module.named_buffers(recurse=False):
            if local_name not in module._non_persistent_buffers_set:
                yield name_inside(f"{path}.{local_name}".lstrip(".")).replace(".base_layer.", "."), buffer
