"""Checks that the parameters of an attached subset are still in the model and receive gradients."""

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
    """Check before a training step that it trains exactly the subset; a hook of the forward pass.

    The check is skipped while torch.compile traces the model; ``adapeft.delta`` checks again. The first step also
    compares values and shapes, as ``adapeft.delta`` does. Otherwise, a parameter that was loaded or resized since
    ``attach`` would be refused only after training.

    Raises:
        AdapeftError: gradients would not reach the whole subset, or would reach other parameters, or the model has
            changed since ``attach``, or is within ``adapeft.base``.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    attachment = attachment_of(model)
    if attachment.is_off:
        raise AdapeftError(
            "a forward pass within adapeft.base(model) records gradients, but the subset takes no part in it, and its "
            "whole tensors no longer hold the pretrained values when backward runs. Call the model without "
            "torch.enable_grad() there, or leave the context before training."
        )
    if model.training:
        _check_step(model, attachment)


@torch.compiler.disable  # a compiled model may call its hooks untraced, but would then trace the functions they call
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
    """Whether FullyShardedDataParallel has replaced the model's parameters by views of its flat ones."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        not isinstance(parameter, nn.Parameter) for parameter in model.parameters()
    )


def _check_shapes(attachment: Attachment) -> None:
    for name, owners in attachment.owners.items():
        for piece, parameter in attachment.pieces(name).items():
            if not is_divided(parameter) and tuple(parameter.shape) != owners[piece].shape:
                raise AdapeftError(
                    f"the parameter that trains {name!r} had shape {owners[piece].shape} when the subset was attached "
                    f"and has {tuple(parameter.shape)} now, which does not fit the base. Resize the model first, save "
                    f"it as the base with save_pretrained, and then call adapeft.attach."
                )


def _check_nothing_else(model: nn.Module, attachment: Attachment) -> None:
    trained = {id(parameter) for name in attachment.owners for parameter in attachment.pieces(name).values()}
    others = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in trained]
    if others:
        raise AdapeftError(
            f"{len(others)} parameters outside the subset require gradients, such as {others[0]!r}: after "
            f"adapeft.attach, requires_grad was set to True, a module was added or a weight was untied, as by "
            f"model.requires_grad_(True), resize_token_embeddings or load_state_dict(assign=True). They would be "
            f"trained, but no delta would contain their training. Include them in the subset (select's include or "
            f"always_train), and change the model before adapeft.attach."
        )


def check_in_place(model: nn.Module, attachment: Attachment) -> None:
    """Check that the modules that hold the trained parameters are still modules of ``model``.

    Raises:
        AdapeftError: one was replaced, or PEFT has added layers to the model.
    """
    modules = set(model.modules())
    own = {owner.module for owners in attachment.owners.values() for owner in owners.values()}
    for name, owners in attachment.owners.items():
        if any(owner.module not in modules for owner in owners.values()):
            raise AdapeftError(
                f"the module that trains {name!r} is no longer in the model: it was replaced after adapeft.attach, so "
                f"the model does not use what is trained. Call adapeft.attach after the replacement."
            )
    for path, module in model.named_modules():
        if own.isdisjoint(module.modules()) and isinstance(module, BaseTunerLayer):
            raise AdapeftError(
                f"PEFT has added a layer to the model at {path!r} after adapeft.attach, which a delta would not "
                f"contain. Train either a subset or PEFT's adapters; for LoRA within a subset use "
                f"select(method='lora')."
            )


def unreached_error(attachment: Attachment, names: Sequence[str]) -> AdapeftError:
    """Return the error for parts ``names`` of a subset that received no gradient."""
    parts = attachment.subset.parts
    # Added parameters act on the output of a layer, so they have no effect if the layer is not called.
    is_added = any(parts[name].pieces for name in names if name in parts)
    adds = "LoRA and adapters also have no effect on a layer whose weight another module reads. " if is_added else ""
    return AdapeftError(
        f"{len(names)} of the {len(attachment.owners)} trained parts of the subset received no gradient from any "
        f"training step so far, so they would keep the base's values: {', '.join(names)}. The model does not use them "
        f"for these batches. {adds}Remove them from the subset with select.exclude, or from select.always_train."
    )


def check_reached(attachment: Attachment, moved: Mapping[str, bool]) -> None:
    """Check that every trained part has received a gradient, or has changed in another way.

    Args:
        attachment: attachment of the model. If it has recorded no gradient at all, nothing is checked.
        moved: name of each part of the base → whether it differs from its start.

    Raises:
        AdapeftError: gradients reached only some of the parts.
    """
    still = [name for name in attachment.unreached if not moved.get(name, False)]
    if attachment.reached and still:
        raise unreached_error(attachment, still)


def check_moved(attachment: Attachment, moved: Mapping[str, bool]) -> None:
    """Check that training has changed the base's parameters of the subset; warn if it has changed none.

    Args:
        attachment: attachment of the model.
        moved: name of each part of the base → whether it differs from its start.

    Raises:
        AdapeftError: a part is frozen and has not changed.
    """
    still = [name for name, has_moved in moved.items() if not has_moved]
    frozen = [name for name in still if any(not p.requires_grad for p in attachment.pieces(name).values())]
    if frozen:
        raise frozen_error(frozen, len(attachment.owners))
    if moved and len(still) == len(moved):
        warnings.warn(
            f"none of the {len(moved)} parts of the subset has changed since adapeft.attach, so the delta changes "
            f"nothing. If the model was trained, then either a copy of it was trained, or the optimizer was created "
            f"before adapeft.attach and updates other parameters.",
            stacklevel=4,
        )


def frozen_error(names: Sequence[str], count: int) -> AdapeftError:
    """Return the error for parts ``names``, of a subset of ``count`` parts, that were frozen after ``attach``."""
    return AdapeftError(
        f"{len(names)} of the {count} trained parts of the subset are frozen, such as {names[0]!r}: requires_grad was "
        f"set to False after adapeft.attach, as by PEFT in get_peft_model, in a trainer's peft_config and in "
        f"prepare_model_for_kbit_training. They would keep the base's values. Call adapeft.attach after that, on a "
        f"model without layers of PEFT; for LoRA within the subset use select(method='lora')."
    )
