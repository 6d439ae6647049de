"""Checkpoints of the Trainer: what an attached subset has trained, without the frozen weights, as in PEFT.

The Trainer writes ``checkpoint-N/model.safetensors`` through ``save_pretrained`` and reads it through
``load_state_dict``, to resume and to load the best model. The file holds the trained parameters and the buffers by
their names in the model, and which base and which subset they belong to. Hooks on the model refuse a file that does not
fit, and accept that the frozen weights are not in it.

Without ``config.json``, ``from_pretrained`` of a model's class would build a random model and only report what the file
lacks, and a Trainer whose model has no subset would train on from the base. Therefore the file also holds a frozen
weight without elements: its shape is an error for everything but the hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import SAFE_WEIGHTS_NAME

from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_tensors
from adapeft.model.wrappers import ATTACHMENT, name_inside
from adapeft.parts.layers.lora import BASE_LAYER
from adapeft.tune.attachment import Attachment, check_is_on

SUBSET_NAME = "subset.safetensors"
"""The subset's file in the folder of a checkpoint."""

_BASE, _SUBSET = "adapeft.base", "adapeft.subset"
"""Keys of the fingerprint of the base and of the digest of the subset, as bytes: the Trainer reads only tensors."""


def save_checkpoint(
    model: nn.Module, attachment: Attachment, folder: Path, state: Mapping[str, Tensor], *, writes: bool
) -> None:
    """Write the trained values and the subset of ``model`` into the folder of a checkpoint.

    Args:
        model: model with an attached subset.
        attachment: its attachment.
        folder: folder of the checkpoint.
        state: its state dict with whole values; empty if a trainer saves shards separately.
        writes: whether this process writes.

    Raises:
        AdapeftError: the state dict has only some of the trained values.
    """
    names = _stored(model, attachment)
    values = {name: state[name] for name in names if name in state}
    if not values:
        return
    if missing := names - values.keys():
        raise AdapeftError(
            f"save_pretrained: the state dict has no {min(missing)!r}, which a checkpoint needs. Pass the whole state "
            f"dict of the attached model."
        )
    if writes:
        guard = {name: torch.empty(0) for name in _frozen(model, names)[:1]}
        belongs = {_BASE: _as_bytes(attachment.fingerprint), _SUBSET: _as_bytes(attachment.subset.digest)}
        save_tensors(folder / SAFE_WEIGHTS_NAME, "checkpoint", {**values, **guard, **belongs}, {})
        attachment.subset.save(folder / SUBSET_NAME)


def hook_loading(model: nn.Module) -> list[RemovableHandle]:
    """Make ``load_state_dict`` of ``model`` accept checkpoints that fit it, and refuse others."""
    return [
        model.register_load_state_dict_pre_hook(_check),
        model.register_load_state_dict_post_hook(_forget_frozen),
    ]


def _check(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Check that a checkpoint in ``state`` belongs to the model; other state dicts pass.

    Raises:
        AdapeftError: it belongs to another base or subset, or lacks values.
    """
    if prefix + _BASE not in state:
        return
    attachment: Attachment = getattr(model, ATTACHMENT)
    check_is_on(attachment, "load_state_dict")
    base = _as_text(state[prefix + _BASE])
    if base != attachment.fingerprint:
        raise AdapeftError(
            f"the checkpoint was trained on a base model with fingerprint {base[:12]}, but the subset is attached to "
            f"one with {attachment.fingerprint[:12]}. Load the checkpoint's base, attach its subset, and resume again."
        )
    expected = _stored(model, attachment)
    guards = [name for name in _frozen(model, expected) if prefix + name in state and not state[prefix + name].numel()]
    for name in guards:
        del state[prefix + name]
    found = {name.removeprefix(prefix) for name in state if name.startswith(prefix)} - {_BASE, _SUBSET}
    if _as_text(state.get(prefix + _SUBSET)) != attachment.subset.digest or found != expected:
        differing = min(found ^ expected, default=None)
        reason = "" if differing is None else f" One of them trains {differing!r}, the other does not."
        raise AdapeftError(
            f"the checkpoint was trained with another subset than the one that is attached.{reason} Attach the "
            f"checkpoint's own, adapeft.Subset.load('checkpoint-…/{SUBSET_NAME}'), and resume again."
        )


def _forget_frozen(model: nn.Module, keys: Any) -> None:
    """Remove the frozen weights from the keys that a checkpoint lacks; ``_check`` has found all others."""
    marks = [key for key in keys.unexpected_keys if key.endswith(_BASE)]
    for mark in marks:
        prefix = mark.removesuffix(_BASE)
        keys.unexpected_keys[:] = [key for key in keys.unexpected_keys if key not in (mark, prefix + _SUBSET)]
        keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(prefix)]


def _stored(model: nn.Module, attachment: Attachment) -> set[str]:
    """Return the names in the state dict of what a checkpoint holds: every trained parameter once, and buffers."""
    trained = {id(piece) for name in attachment.owners for piece in attachment.pieces(name).values()}
    found = {name_inside(name) for name, parameter in model.named_parameters() if id(parameter) in trained}
    for path, module in model.named_modules():
        for name, _ in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.add(name_inside(f"{path}.{name}".lstrip(".")))
    return found


def _frozen(model: nn.Module, stored: set[str]) -> list[str]:
    """Return the names of the parameters that are not in a checkpoint, of those with the same name in the base."""
    names = [name_inside(name) for name, _ in model.named_parameters()]
    return [name for name in names if name not in stored and f".{BASE_LAYER}." not in name]


def _as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _as_text(value: Tensor | None) -> str:
    return "" if value is None else bytes(value.tolist()).decode(errors="replace")
