"""Attach a subset to a model: freeze everything, and make exactly the subset trainable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapeft.choose.empty import check_not_empty
from adapeft.choose.subset import Subset
from adapeft.errors import AdapeftError
from adapeft.inputs.fingerprint import fingerprint_model
from adapeft.tune.adapter import add_adapter, check_adapters, remove_adapter, starting_pieces
from adapeft.tune.buffers import set_buffers, stored_buffers
from adapeft.tune.leaves import DensePart, add_dense_leaves, add_leaf, leaf_shape, remove_leaves
from adapeft.tune.lora import add_lora, check_lora, remove_lora
from adapeft.tune.rules.make import rule_of
from adapeft.tune.rules.rule import DIFFERENCE, Place, Rule

if TYPE_CHECKING:
    from adapeft.tune.follow import Follower

_ATTRIBUTE = "adapeft_attachment"


@dataclass
class Attachment:
    """What ``attach`` did to a model.

    Attributes:
        subset: the subset attached.
        fingerprint: of the base model.
        trained: name → the trainable parameter: a leaf, or the parameter itself where it is trained whole; what a
            part adds has the part's name and its own, ``….weight.lora_A``.
        added: name → the parameters that the part adds, by their own names.
        base: name → its value before training, float32 on the CPU, where it is trained whole and not new.
        required_grad: ``requires_grad`` of every parameter before.
        rule: of the dense parts; that of a fixed mask where there are none.
        dense: name → the leaves of a dense part.
        buffers: name → value before training, on the CPU, of every buffer that a checkpoint holds.
        dropout: module and attribute → the probability before, where the rule turned dropout off.
        follower: what keeps the rule, once an optimizer is there.
    """

    subset: Subset
    fingerprint: str
    trained: dict[str, nn.Parameter]
    added: dict[str, dict[str, nn.Parameter]] = field(repr=False)
    base: dict[str, Tensor]
    required_grad: dict[str, bool] = field(repr=False)
    rule: Rule
    dense: dict[str, DensePart] = field(repr=False)
    buffers: dict[str, Tensor] = field(repr=False)
    dropout: dict[tuple[nn.Module, str], float] = field(repr=False)
    follower: Follower | None = None


def attach(model: nn.Module, subset: Subset) -> nn.Module:
    """Makes exactly ``subset`` trainable, in place, and returns the model.

    Whole tensors train themselves; rows and elements get a leaf, a small parameter that starts at zero. All else is
    frozen, so optimizer state, gradients and checkpoints are as large as the subset with any trainer. A tied weight has
    one leaf in every module that uses it. Dense parts get a leaf of the parameter's own shape, and their method's rule
    needs ``adapeft.follow_rule`` besides. A layer with LoRA is wrapped in PEFT's, until ``detach``: its own parameters
    are named ``….base_layer.…`` in the model meanwhile, and as ever in the subset and the delta.

    Raises:
        AdapeftError: the model already has a subset, or the subset is empty or was chosen for another model, or a part
            does not go with its layer.
    """
    if hasattr(model, _ATTRIBUTE):
        raise AdapeftError("this model already has a subset attached: call adapeft.detach(model) first.")
    check_not_empty(subset)
    subset.check_fits(model)
    fingerprint = fingerprint_model(model, subset.new)
    chosen_for = subset.description.get("fingerprint")
    if fingerprint and chosen_for is not None and chosen_for != fingerprint:
        raise AdapeftError(
            f"the subset was chosen for a base model of fingerprint {chosen_for[:12]}, this one has "
            f"{fingerprint[:12]}: load the base model it was chosen on."
        )
    rule = rule_of(subset)
    buffers = stored_buffers(model)
    parameters = dict(model.named_parameters())
    required_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
    owners = _owners(model)
    added = _add(model, subset, {name: owners[parameters[name]] for name in subset.parts if name in parameters})
    model.requires_grad_(False)
    trained: dict[str, nn.Parameter] = {}
    dense: dict[str, DensePart] = {}
    base: dict[str, Tensor] = {}
    for name in subset.always_train:
        trained[name] = parameters[name]
    for name, part in subset.parts.items():
        if name in added:
            trained.update({f"{name}.{piece}": parameter for piece, parameter in added[name].items()})
            continue
        parameter = parameters[name]
        if part.kind == "tensor":
            trained[name] = parameter
            continue
        if part.kind == "dense":
            dense[name] = _attach_dense(name, parameter, owners[parameter], rule)
            trained[name] = dense[name].leaves[DIFFERENCE]
            continue
        leaf = nn.Parameter(torch.zeros(leaf_shape(part), dtype=torch.float32, device=parameter.device))
        for module, local_name in owners[parameter]:
            add_leaf(module, local_name, part, leaf)
        trained[name] = leaf
    for name, parameter in trained.items():
        parameter.requires_grad_(True)
        if parameter is parameters.get(name) and name not in subset.new and not parameter.is_meta:
            base[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    dropout = _turn_dropout_off(model) if rule.turns_dropout_off else {}
    attachment = Attachment(subset, fingerprint, trained, added, base, required_grad, rule, dense, buffers, dropout)
    setattr(model, _ATTRIBUTE, attachment)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Takes the subset off again, in place: the base weights and classes are back, trained values are dropped.

    New parameters (a head) keep their trained values, for there is no base to go back to.
    """
    attachment = attachment_of(model)
    for name in attachment.added:
        if attachment.subset.parts[name].kind == "adapter":
            remove_adapter(model, name)
    remove_lora(model, [name for name in attachment.added if attachment.subset.parts[name].kind == "lora"])
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
    delattr(model, _ATTRIBUTE)
    return model


def attachment_of(model: nn.Module) -> Attachment:
    """The attachment of a model.

    Raises:
        AdapeftError: nothing is attached.
    """
    attachment = getattr(model, _ATTRIBUTE, None)
    if attachment is None:
        raise AdapeftError("no subset is attached to this model: call adapeft.attach(model, subset) first.")
    return attachment


def _add(
    model: nn.Module, subset: Subset, owners: Mapping[str, Sequence[tuple[nn.Module, str]]]
) -> dict[str, dict[str, nn.Parameter]]:
    """Adds LoRA, then adapters behind it, once all are known to go with their layers."""
    lora = {name: part for name, part in subset.parts.items() if part.kind == "lora"}
    adapters = {name: part for name, part in subset.parts.items() if part.kind == "adapter"}
    check_lora(model, lora, owners)
    check_adapters(model, adapters)
    seed = subset.description.get("seed", 0)
    added = add_lora(model, lora, seed) if lora else {}
    for name, part in adapters.items():
        added[name] = add_adapter(model, name, starting_pieces(name, part, seed))
    return added


def _attach_dense(name: str, parameter: nn.Parameter, owners: Sequence[tuple[nn.Module, str]], rule: Rule) -> DensePart:
    linear = all(type(module) in (nn.Linear, Conv1D) and local == "weight" for module, local in owners)
    input_dim = (0 if isinstance(owners[0][0], Conv1D) else 1) if linear else None
    shape = tuple(parameter.shape)
    values = {DIFFERENCE: torch.zeros(shape), **{leaf: rule.start(leaf, shape) for leaf in rule.extra_leaves}}
    leaves = {leaf: nn.Parameter(value.to(parameter.device)) for leaf, value in values.items()}
    part = DensePart(Place(name, input_dim), rule, leaves)
    for module, local_name in owners:
        add_dense_leaves(module, local_name, part)
    return part


def _turn_dropout_off(model: nn.Module) -> dict[tuple[nn.Module, str], float]:
    """Returns the probabilities before, of modules and of layers that keep one for the functional form, as OPT's do."""
    before = {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or (isinstance(module, nn.Dropout) and name == "p"))
    }
    for module, name in before:
        setattr(module, name, 0.0)
    return before


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every module that holds a parameter, with its name there; more than one for tied weights."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((module, name))
    return owners
