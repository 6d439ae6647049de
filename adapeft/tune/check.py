"""Checks that what ``attach`` made trainable is still in the model, and that training has reached it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.tune.attach import Attachment, frozen_error


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
