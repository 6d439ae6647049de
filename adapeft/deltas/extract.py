"""Extraction of a delta from a model whose attached subset was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.finite import DIVERGED
from adapeft.model.dense import check_resident
from adapeft.model.divided import full_value as whole_value
from adapeft.model.divided import unsharded, whole_of
from adapeft.model.load import describe_model
from adapeft.model.wrappers import unwrap
from adapeft.parts.change import Change
from adapeft.parts.whole import Whole
from adapeft.tune.attachment import Attachment, Owner, attachment_of, check_is_on
from adapeft.tune.buffers import changed_buffers
from adapeft.tune.check import check_in_place, check_moved, check_reached
from adapeft.tune.frozen import check_frozen


def extract_delta(
    model: nn.Module,
    description: Mapping[str, Any] | None = None,
    full_value: Callable[[nn.Parameter], Tensor] = whole_value,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Delta:
    """Return the delta of a model that has a subset attached. Collective if a trainer sharded the model over ranks.

    Args:
        model: model after ``attach`` and training, as it is or wrapped by a trainer.
        description: metadata for the file's header; its keys override those that describe the model.
        full_value: function that returns a whole trained parameter in float32; the default also gathers the shards of
            FSDP and ZeRO.
        keep: function that returns each value as the delta should hold it, such as on disk; None: as it is.

    Raises:
        AdapeftError: nothing is attached, or a trained parameter was frozen, removed or replaced since, or has never
            received a gradient.
    """
    inner = unwrap(model)
    check_resident(inner, "delta")
    attachment = attachment_of(inner)
    check_is_on(attachment, "delta")
    check_in_place(inner, attachment)
    with unsharded(model), _as_shipped(attachment):
        check_frozen(inner, attachment)
        changes, new, moved = _trained(attachment, full_value, keep or _as_it_is)
    check_moved(attachment, moved)
    check_reached(attachment, moved)
    buffers = changed_buffers(inner, attachment.buffers)
    described = {"model": describe_model(inner), **(description or {})}
    delta = Delta(changes, new, attachment.fingerprint, described, buffers, attachment.digests)
    delta.check_finite(DIVERGED, "Train again at a lower learning rate, or in float32.")
    return delta


def _trained(
    attachment: Attachment, full_value: Callable[[nn.Parameter], Tensor], keep: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Change], dict[str, Tensor], dict[str, bool]]:
    """Return the changes of the base, the new parameters, and for every part of the base whether it has moved."""
    changes: dict[str, Change] = {}
    new: dict[str, Tensor] = {}
    moved: dict[str, bool] = {}
    for name, owners in attachment.owners.items():
        pieces = attachment.pieces(name)
        values = [_read(name, owner, pieces[piece], full_value) for piece, owner in owners.items()]
        if name in attachment.subset.new:
            new[name] = keep(values[0])
            continue
        part = attachment.subset.parts.get(name) or Whole(owners[""].shape)
        base = attachment.base.get(name)
        if base is not None:
            base = whole_of(base, pieces[""])
        found = part.extract(values, base, attachment.dense.get(name))
        moved[name] = found is not None and Change(*found).has_moved
        if found is not None:
            changes[name] = Change(found[0], keep(found[1]))
    return changes, new, moved


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _read(name: str, owner: Owner, parameter: nn.Parameter, full_value: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """Return a copy of a whole trained parameter, float32 on the CPU.

    On one rank ZeRO returns views of the live values, which training continues to change; hence the copy.

    Raises:
        AdapeftError: this process holds only a part of the parameter, or nothing.
    """
    value = full_value(parameter)
    if tuple(value.shape) != owner.shape or value.is_meta:
        raise AdapeftError(
            f"the parameter that trains {name!r} has shape {tuple(value.shape)} on {value.device} here instead of "
            f"{owner.shape}: this process does not hold the whole parameter. Call adapeft.delta on every rank, with "
            f"the model as wrapped by the trainer, before the trainer is torn down."
        )
    return value.to("cpu", torch.float32, copy=True)


def _as_shipped(attachment: Attachment) -> AbstractContextManager[None]:
    """Project the model within the context, if its rule ships projected weights.

    Raises:
        AdapeftError: the rule was not followed in training, or has not projected yet.
    """
    if not attachment.dense:
        return nullcontext()
    method, follower = attachment.subset.choice.method, attachment.follower
    if follower is None:
        raise AdapeftError(
            f"the rule of {method} was not followed in training, so its budget does not hold: call "
            f"adapeft.follow_rule(model, optimizer, num_steps=…) before the first step."
        )
    if not follower.is_ready:
        raise AdapeftError(
            f"{method} has not projected yet: {follower.rule.step} of {follower.num_steps} steps are done. Continue "
            f"training."
        )
    return follower.as_shipped()
