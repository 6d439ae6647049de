"""Attach a subset to a model: freeze everything, and make exactly the subset trainable."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapeft.choose.subset import Subset
from adapeft.errors import AdapeftError
from adapeft.inputs.fingerprint import fingerprint_model
from adapeft.tune.leaves import add_leaf, leaf_shape, remove_leaves

_ATTRIBUTE = "adapeft_attachment"


@dataclass(frozen=True)
class Attachment:
    """What ``attach`` did to a model.

    Attributes:
        subset: the subset attached.
        fingerprint: of the base model.
        trained: name → the trainable parameter: a leaf, or the parameter itself where it is trained whole.
        base: name → its value before training, float32 on the CPU, where it is trained whole and not new.
        required_grad: ``requires_grad`` of every parameter before.
    """

    subset: Subset
    fingerprint: str
    trained: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    required_grad: dict[str, bool] = field(repr=False)


def attach(model: nn.Module, subset: Subset) -> nn.Module:
    """Makes exactly ``subset`` trainable, in place, and returns the model.

    Whole tensors train themselves; rows and elements get a leaf, a small parameter that starts at zero. All else is
    frozen, so optimizer state, gradients and checkpoints are as large as the subset with any trainer. A tied weight has
    one leaf in every module that uses it.

    Raises:
        AdapeftError: the model already has a subset, or the subset was chosen for another model.
    """
    if hasattr(model, _ATTRIBUTE):
        raise AdapeftError("this model already has a subset attached: call adapeft.detach(model) first.")
    subset.check_fits(model)
    fingerprint = fingerprint_model(model, subset.new)
    chosen_for = subset.description.get("fingerprint")
    if chosen_for is not None and chosen_for != fingerprint:
        raise AdapeftError(
            f"the subset was chosen for a base model of fingerprint {chosen_for[:12]}, this one has "
            f"{fingerprint[:12]}: load the base model it was chosen on."
        )
    parameters = dict(model.named_parameters())
    required_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
    owners = _owners(model)
    model.requires_grad_(False)
    trained: dict[str, nn.Parameter] = {}
    base: dict[str, Tensor] = {}
    for name in subset.always_train:
        trained[name] = parameters[name]
    for name, part in subset.parts.items():
        parameter = parameters[name]
        if part.indices is None:
            trained[name] = parameter
            continue
        leaf = nn.Parameter(torch.zeros(leaf_shape(part), dtype=torch.float32, device=parameter.device))
        for module, local_name in owners[parameter]:
            add_leaf(module, local_name, part, leaf)
        trained[name] = leaf
    for name, parameter in trained.items():
        parameter.requires_grad_(True)
        if parameter is parameters[name] and name not in subset.new:
            base[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    setattr(model, _ATTRIBUTE, Attachment(subset, fingerprint, trained, base, required_grad))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Takes the subset off again, in place: the base weights and classes are back, trained values are dropped.

    New parameters (a head) keep their trained values, for there is no base to go back to.
    """
    attachment = attachment_of(model)
    for module in model.modules():
        remove_leaves(module)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in attachment.base.items():
            parameters[name].copy_(value)
    for name, required in attachment.required_grad.items():
        parameters[name].requires_grad_(required)
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


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every module that holds a parameter, with its name there; more than one for tied weights."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((module, name))
    return owners
