"""The buffers that training changes: running statistics of a normalization, codebooks, vectors of a spectral norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from adapeft.errors import AdapeftError
from adapeft.model.wrappers import name_inside


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of the buffers that a checkpoint of ``model`` holds, by name."""
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in _stored(model) if not buffer.is_meta}


def changed_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``stored_buffers`` whose values are other than ``before``, whatever module changed them, in its dtypes.

    They are compared, for no list of module types is complete: a forward in training mode may write to any buffer.

    Raises:
        AdapeftError: a buffer has another shape than before, for which the base has no place.
    """
    found = {}
    for name, buffer in _stored(model):
        if name not in before:
            continue
        if buffer.shape != before[name].shape:
            raise AdapeftError(
                f"the buffer {name!r} had shape {tuple(before[name].shape)} when the subset was attached and has "
                f"{tuple(buffer.shape)} now: the base has no place for it. Save the model with save_pretrained instead."
            )
        value = buffer.detach().cpu()
        # An engine may have cast the model since, which is no training.
        if not torch.equal(value, before[name].to(value.dtype)):
            found[name] = value.to(before[name].dtype, copy=True)
    return found


@torch.no_grad()
def set_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Writes ``values`` into the buffers of these names."""
    for name, buffer in _stored(model):
        if name in values:
            buffer.copy_(values[name])


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in the base, buffer) of every persistent buffer.

    PEFT puts layers with LoRA under ``base_layer``, and trainers may have wrapped modules since ``attach``.
    """
    for path, module in model.named_modules():
        for local_name, buffer in module.named_buffers(recurse=False):
            if local_name not in module._non_persistent_buffers_set:
                yield name_inside(f"{path}.{local_name}".lstrip(".")).replace(".base_layer.", "."), buffer
