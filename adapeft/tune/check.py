"""Checks that what ``attach`` made trainable is still in the model, and that training has reached it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from adapeft.errors import AdapeftError
from adapeft.model.divided import is_divided
from adapeft.tune.attachment import Attachment, attachment_of
from adapeft.tune.frozen import check_frozen


def check_step(model: nn.Module, inputs: object) -> None:
    """Checks before a training step that it trains the subset and nothing else; a hook of the forward pass.

    Not while torch.compile traces it, which has no use for a check; ``adapeft.delta`` looks again. The first step
    also compares values and shapes, as ``adapeft.delta`` does: what was loaded or resized since ``attach`` would
    otherwise be refused after the training.

    Raises:
        AdapeftError: gradients would not reach the whole subset, or would reach more than it, or the model is no
            longer the one that it was attached to.
    """
    if not model.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    _check_step(model, attachment_of(model))


@torch.compiler.disable  # where a compiled model calls its hooks untraced, what they call would be traced
def _check_step(model: nn.Module, attachment: Attachment) -> None:
    frozen = [name for name, parameter in attachment.trained.items() if not parameter.requires_grad]
    if frozen:
        raise frozen_error(frozen, len(attachment.owners))
    if _is_flattened(model):
        return
    if not attachment.is_checked:
        check_in_place(model, attachment)
        _check_shapes(attachment)
        check_frozen(model, attachment)
        attachment.is_checked = True
    _check_nothing_else(model, attachment)


def _is_flattened(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel has put views of its flat parameters where the model's own were."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        not isinstance(parameter, nn.Parameter) for parameter in model.parameters()
    )


def _check_shapes(attachment: Attachment) -> None:
    for name, owners in attachment.owners.items():
        for piece, parameter in attachment.pieces(name).items():
            if not is_divided(parameter) and tuple(parameter.shape) != owners[piece].shape:
                raise AdapeftError(
                    f"the parameter that trains {name!r} had shape {owners[piece].shape} when the subset was attached "
                    f"and has {tuple(parameter.shape)} now: the base has no place for it. Resize the model first, save "
                    f"it as the base with save_pretrained, and call adapeft.attach then."
                )


def _check_nothing_else(model: nn.Module, attachment: Attachment) -> None:
    trained = {id(parameter) for name in attachment.owners for parameter in attachment.pieces(name).values()}
    others = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in trained]
    if others:
        raise AdapeftError(
            f"{len(others)} parameters outside of the subset require gradients, such as {others[0]!r}: something set "
            f"requires_grad to True, added a module or untied a weight after adapeft.attach, as "
            f"model.requires_grad_(True), resize_token_embeddings and load_state_dict(assign=True) do. "
            f"They would be trained, and no delta would hold it. Choose them in the subset (select's include or "
            f"always_train), and change the model before adapeft.attach."
        )


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
    parts = attachment.subset.parts
    # What a part adds works on the output of a layer, and so only where that is called.
    is_added = any(parts[name].pieces for name in names if name in parts)
    adds = "LoRA and adapters also miss a layer whose weight another module reads. " if is_added else ""
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


def frozen_error(names: Sequence[str], count: int) -> AdapeftError:
    """What to say where ``names`` of a subset of ``count`` parts were frozen after ``attach``."""
    return AdapeftError(
        f"{len(names)} of the {count} trained parts of the subset are frozen, such as {names[0]!r}: something set "
        f"requires_grad to False after adapeft.attach, as PEFT does in get_peft_model, in a trainer's peft_config and "
        f"in prepare_model_for_kbit_training. They would stay at the base's values. Call adapeft.attach after it, on a "
        f"model without PEFT's layers; for LoRA within the subset use select(method='lora')."
    )
