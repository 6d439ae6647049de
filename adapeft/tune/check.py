"""Checks that what ``attach`` made trainable is still in the model, and that training has reached it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.tune.attach import frozen_error
from adapeft.tune.attachment import Attachment

_ADDED = {"lora", "adapter"}
"""Kinds of parts that work on the output of a layer, and so only where it is called."""


def check_in_place(model: nn.Module, attachment: Attachment) -> None:
    """Checks that the modules that hold the trained parameters are those that ``model`` computes with.

    Raises:
        AdapeftError: one was replaced, or PEFT has put layers of its own into the model.
    """
    modules = set(model.modules())
    own = {owner.module for owners in attachment.owners.values() for owner in owners.values()}
    for name, owners in attachment.owners.items():
        if any(owner.module not in modules for owner in owners.values()):
            raise AdapeftError(
                f"the module that trains {name!r} is no longer in the model: something has replaced it since "
                f"adapeft.attach, so its training is not what the model computes. Call adapeft.attach after that."
            )
    for path, module in model.named_modules():
        if own.isdisjoint(module.modules()) and isinstance(module, BaseTunerLayer):
            raise AdapeftError(
                f"PEFT has put a layer of its own into the model at {path!r} since adapeft.attach, which a delta would "
                f"leave out. Train a subset or PEFT's adapters; for LoRA within a subset use select(method='lora')."
            )


def unreached_error(attachment: Attachment, names: Sequence[str]) -> AdapeftError:
    """What to say where training gave ``names`` of a subset no gradient."""
    kinds = {attachment.subset.parts[name].kind for name in names if name in attachment.subset.parts}
    adds = "LoRA and adapters also miss a layer whose weight another module reads. " if kinds & _ADDED else ""
    return AdapeftError(
        f"{len(names)} of the {len(attachment.owners)} trained parts of the subset received no gradient from any "
        f"training step so far, so they would stay at the base's values: {', '.join(names)}. The model does not use "
        f"them for these batches. {adds}Leave them out of the subset with select.exclude, or out of "
        f"select.always_train."
    )


def check_reached(attachment: Attachment, moved: Mapping[str, bool]) -> None:
    """Checks that whatever is trained has received a gradient at some time, or has its value from elsewhere.

    Args:
        attachment: of the model. Where no gradient was noted at all, nothing is known.
        moved: name of each part of the base → whether it differs from its start.

    Raises:
        AdapeftError: gradients reached some parts and others not.
    """
    still = [name for name in attachment.unreached if not moved.get(name, False)]
    if attachment.reached and still:
        raise unreached_error(attachment, still)


def check_moved(attachment: Attachment, moved: Mapping[str, bool]) -> None:
    """Checks that training has reached the base's parameters of the subset.

    Args:
        attachment: of the model.
        moved: name of each part of the base → whether it differs from its start.

    Raises:
        AdapeftError: a part is frozen and has not moved.
    """
    still = [name for name, has_moved in moved.items() if not has_moved]
    frozen = [name for name in still if any(not p.requires_grad for p in attachment.pieces(name).values())]
    if frozen:
        raise frozen_error(frozen, len(attachment.owners))
    if moved and len(still) == len(moved):
        warnings.warn(
            f"none of the {len(moved)} parts of the subset has moved since adapeft.attach, so the delta changes "
            f"nothing. If the model was trained, it was a copy of it, or its optimizer was made before adapeft.attach "
            f"and steps other parameters.",
            stacklevel=4,
        )
