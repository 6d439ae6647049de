"""Attach a subset to a model: freeze everything else and make exactly the subset trainable."""

from __future__ import annotations

import torch
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.methods.rules import rule_of
from adapeft.model.dense import check_dense
from adapeft.model.divided import own_part
from adapeft.model.fingerprint import digests_of, entries_of, fingerprint_model
from adapeft.model.places import places_of
from adapeft.model.quantized import (
    admit_to_trainer,
    check_not_whole,
    keep_codes_in_place,
    let_codes_be_repacked,
    quantized_weights,
    undo_admission,
)
from adapeft.model.rounding import warn_of_coarse_training
from adapeft.model.wrappers import ATTACHMENT, bare, check_before_trainer
from adapeft.parts.layers.leaves import remove_leaves
from adapeft.parts.part import Site
from adapeft.parts.registry import by_kind
from adapeft.parts.rule import Ruled
from adapeft.subset.empty import check_not_empty
from adapeft.subset.subset import Subset
from adapeft.tune.agreement import check_agreement
from adapeft.tune.attachment import Attachment, Owner, attachment_of, check_is_on
from adapeft.tune.buffers import set_buffers, stored_buffers
from adapeft.tune.check import check_step
from adapeft.tune.checkpoint import hook_loading
from adapeft.tune.saving import hook_saving, unhook_saving


def attach(model: nn.Module, subset: Subset, *, alone: bool = False) -> nn.Module:
    """Make exactly ``subset`` trainable, in place, and return the model.

    Whole tensors are trained in place; rows and elements get a leaf, a small parameter that starts at zero. Everything
    else is frozen, so with any trainer the optimizer state, gradients and checkpoints are as large as the subset. A
    tied weight has one leaf in every module that uses it. Dense parts get a leaf of the parameter's shape, and the rule
    of their method also requires ``adapeft.follow_rule``. A layer with LoRA is wrapped in a layer of PEFT until
    ``detach``: meanwhile its parameters are named ``….base_layer.…`` in the model, but keep their names in the subset
    and the delta.

    Attach before the model is sharded or wrapped for training (``fully_shard``, ``deepspeed.initialize``,
    DistributedDataParallel) and before the optimizer is created, on every rank with the same saved subset. Its weights
    may already be divided by ``deepspeed.zero.Init``; attaching is then collective.

    The model's ``state_dict`` holds the base and the leaves under separate names, and loads into a model with the same
    subset attached. ``save_pretrained``, and so the Trainer's ``save_model``, writes the trained model, and the
    Trainer's checkpoints hold what is trained; see ``adapeft.tune.saving`` and ``adapeft.tune.checkpoint``.

    Args:
        model: model to train.
        subset: what to train of it.
        alone: whether this rank of torch.distributed trains by itself, so that others may attach other subsets.

    Raises:
        AdapeftError: the model already has a subset or is sharded or wrapped for training, the subset is empty or was
            chosen for another model, another rank attaches another one, or a part does not fit its layer.
    """
    check_before_trainer(model, "attach")
    passed, model = model, bare(model, "attach", gathers=True)
    if hasattr(model, ATTACHMENT):
        raise AdapeftError("this model already has a subset attached. Call adapeft.detach(model) first.")
    check_not_empty(subset)
    if not alone:
        check_agreement(subset)
    changed = {*subset.parts, *subset.always_train}
    quantized = quantized_weights(model)
    on_quantized = {name for name, part in subset.parts.items() if part.adds_to_output and name in quantized}
    check_not_whole("attach", changed - on_quantized, quantized)
    check_dense("attach", [entry for entry in model.named_parameters() if entry[0] in changed - on_quantized])
    subset.check_fits(model)
    fingerprint = fingerprint_model(model, subset.new)
    chosen_for = subset.choice.fingerprint
    if fingerprint and chosen_for is not None and chosen_for != fingerprint:
        raise AdapeftError(
            f"the subset was chosen for a base model with fingerprint {chosen_for[:12]}, but this model has "
            f"{fingerprint[:12]}. Load the base model for which it was chosen."
        )
    digests = digests_of(entries_of(model, subset.new)) if fingerprint else None
    rule = rule_of(subset)
    buffers = stored_buffers(model)
    parameters = dict(model.named_parameters())
    required_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
    places, kinds = places_of(model), by_kind(subset.parts)
    trained = {name: {"": Owner.of(*places[name][0])} for name in subset.always_train}
    for kind, parts in kinds:
        kind.check_layers(model, parts)
    for kind, parts in kinds:
        kind.prepare(model, parts)
    model.requires_grad_(False)
    dense: dict[str, Ruled] = {}
    for name, part in subset.parts.items():
        attached = part.attach(Site(model, name, places.get(name, ()), subset.choice.seed, rule))
        trained[name] = {piece: Owner.of(*place) for piece, place in attached.pieces.items()}
        if attached.ruled is not None:
            dense[name] = attached.ruled
    whole = [*subset.always_train, *(name for name, part in subset.parts.items() if part.trains_in_place)]
    base = {
        name: own_part(parameters[name]) for name in whole if name not in subset.new and not parameters[name].is_meta
    }
    warn_of_coarse_training({name: parameters[name] for name in whole if not parameters[name].is_meta})
    dropout = _turn_dropout_off(model) if rule.turns_dropout_off else {}
    in_place = keep_codes_in_place(model)
    admit_to_trainer(model)
    hooks = [model.register_forward_pre_hook(check_step), *hook_loading(model), *hook_saving(model)]
    attachment = Attachment(
        subset, fingerprint, digests, trained, base, required_grad, rule, dense, buffers, dropout, hooks, in_place
    )
    for name in trained:
        for parameter in attachment.pieces(name).values():
            parameter.requires_grad_(True)
    attachment.note_gradients()
    setattr(model, ATTACHMENT, attachment)
    return passed


def detach(model: nn.Module) -> nn.Module:
    """Remove the attached subset in place: restore base weights and module classes, and discard trained values.

    New parameters (a head) keep their trained values, because the base has none to restore.
    """
    passed, model = model, bare(model, "detach")
    attachment = attachment_of(model)
    check_is_on(attachment, "detach")
    for kind, parts in reversed(by_kind(attachment.subset.parts)):
        kind.remove(model, parts)
    for module in model.modules():
        remove_leaves(module)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in attachment.base.items():
            parameters[name].copy_(value)
    set_buffers(model, attachment.buffers)
    for name, required in attachment.required_grad.items():
        parameters[name].requires_grad_(required)
    for (module, attribute), probability in attachment.dropout.items():
        setattr(module, attribute, probability)
    let_codes_be_repacked(attachment.in_place)
    undo_admission(model)
    unhook_saving(model)
    for hook in attachment.hooks:
        hook.remove()
    delattr(model, ATTACHMENT)
    return passed


def _turn_dropout_off(model: nn.Module) -> dict[tuple[nn.Module, str], float]:
    """Set all dropout probabilities to 0 and return the old ones.

    They include attributes of layers that use functional dropout, such as those of OPT.
    """
    before = {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or (isinstance(module, nn.Dropout) and name == "p"))
    }
    for module, name in before:
        setattr(module, name, 0.0)
    return before
