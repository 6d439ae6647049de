"""A delta: θ − θ⁰ on the subset, and the new parameters. Small, and bound to its base by fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapeft.artifact import load_tensors, save_tensors
from adapeft.choose.subset import BESIDE, Part
from adapeft.errors import AdapeftError
from adapeft.inputs.fingerprint import fingerprint_model
from adapeft.ship.change import Bottleneck, Change, Difference, LowRank
from adapeft.tune.attach import Attachment, attachment_of
from adapeft.tune.leaves import DensePart


@dataclass
class Applied:
    """A delta that is in a model's weights; keeps the base entries it replaced."""

    model: nn.Module
    _changes: list[tuple[Change, str, Any]]
    _new: list[tuple[str, Tensor]]

    @torch.no_grad()
    def revert(self) -> None:
        """Takes the delta out again; the weights are bit-identical to before."""
        for change, name, before in self._changes:
            change.undo(self.model, name, before)
        for name, value in self._new:
            self.model.get_parameter(name).copy_(value)
        self._changes, self._new = [], []


@dataclass(frozen=True)
class Delta:
    """Changes by parameter name and whole new parameters.

    Attributes:
        changes: differences to the base.
        new: values of parameters that the base does not have (a head).
        fingerprint: of the base.
        description: method, budget, scores, config; whatever the maker wanted to say.
    """

    changes: Mapping[str, Change]
    new: Mapping[str, Tensor]
    fingerprint: str
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Trained elements: of the base, and of LoRA and adapters beside it."""
        return sum(change.count for change in self.changes.values())

    def save(self, path: str | Path) -> None:
        """Writes ``delta.safetensors``: 8 bytes a single element, 4 of any other kind, and a header."""
        parts = {name: change.part.described() for name, change in self.changes.items()}
        tensors = {
            f"{name}.{suffix}": tensor
            for name, change in self.changes.items()
            for suffix, tensor in change.tensors().items()
        }
        for name, value in self.new.items():
            tensors[f"{name}.new"] = value
        content = {**self.description, "parts": parts, "new": list(self.new), "fingerprint": self.fingerprint}
        save_tensors(Path(path), "delta", tensors, content)

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Reads ``delta.safetensors``.

        Raises:
            AdapeftError: not a delta, truncated, or tensors that do not fit their description.
        """
        tensors, content = load_tensors(Path(path), "delta")
        try:
            changes = {
                name: Change.from_tensors(Path(path), name, header, _of_parameter(name, tensors))
                for name, header in content.pop("parts").items()
            }
            new = {name: tensors[f"{name}.new"] for name in content.pop("new")}
            return cls(changes, new, content.pop("fingerprint"), content)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise AdapeftError(f"{path}: damaged description of a delta ({error}).") from error

    def check_fits(self, model: nn.Module) -> None:
        """Checks names, shapes and fingerprint against ``model``.

        Raises:
            AdapeftError: another architecture, other shapes or another base.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        wanted = {name: tuple(change.part.shape) for name, change in self.changes.items()}
        wanted |= {name: tuple(value.shape) for name, value in self.new.items()}
        for name, shape in wanted.items():
            if shapes.get(name) != shape:
                found = shapes.get(name, "nothing")
                raise AdapeftError(f"the delta changes {name!r} of shape {shape}; this model has {found} there.")
        self.check_fingerprint(fingerprint_model(model, self.new))

    def check_fingerprint(self, found: str) -> None:
        """Checks the base's fingerprint.

        Raises:
            AdapeftError: the delta belongs to another base.
        """
        if found != self.fingerprint:
            raise AdapeftError(
                f"the delta belongs to a base model of fingerprint {self.fingerprint[:12]}, this one has {found[:12]}: "
                f"apply it to the base it was trained on."
            )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> Applied:
        """Adds the delta to the model's weights in place; ``revert()`` of the result takes it out again.

        Raises:
            AdapeftError: the model is not the delta's base.
        """
        self.check_fits(model)
        new = [(name, model.get_parameter(name).detach().clone()) for name in self.new]
        changes = [(change, name, change.make(model, name)) for name, change in self.changes.items()]
        for name, value in self.new.items():
            model.get_parameter(name).copy_(value)
        return Applied(model, changes, new)


def extract_delta(
    model: nn.Module,
    description: Mapping[str, Any] | None = None,
    full_value: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach(),
) -> Delta:
    """The delta of a model that has a subset attached.

    Args:
        model: after ``attach`` and training.
        description: goes into the file's header.
        full_value: reads a trained parameter whole and in float32; under ZeRO a collective.
    """
    attachment = attachment_of(model)
    _keep_the_rule(attachment)
    # Copies: on one rank ZeRO hands out views of the live values, which training goes on to change.
    values = {
        name: full_value(parameter).to("cpu", torch.float32, copy=True)
        for name, parameter in attachment.trained.items()
        if name not in attachment.dense
    }
    changes: dict[str, Change] = {}
    for name, part in attachment.subset.parts.items():
        if part.kind == "dense":
            moved = _change_of(attachment.dense[name], full_value)
            if moved is not None:
                changes[name] = moved
        elif part.kind in BESIDE:
            leaves = {leaf: values[f"{name}.{leaf}"] for leaf in part.factor_shapes}
            changes[name] = LowRank(part, leaves) if part.kind == "lora" else Bottleneck(part, leaves)
        else:
            changes[name] = Difference(part, values[name] - attachment.base.get(name, 0.0))
    for name in attachment.subset.always_train:
        if name in attachment.base:
            changes[name] = Difference(Part("tensor", tuple(values[name].shape)), values[name] - attachment.base[name])
    new = {name: values[name] for name in attachment.subset.always_train if name in attachment.subset.new}
    return Delta(changes, new, attachment.fingerprint, dict(description or {}))


def _of_parameter(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of parameter ``name`` by suffix."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def _keep_the_rule(attachment: Attachment) -> None:
    """Projects where the rule ships what is projected.

    Raises:
        AdapeftError: nobody followed the rule in training, or it is too early to ship.
    """
    if not attachment.dense:
        return
    method, follower = attachment.subset.description.get("method"), attachment.follower
    if follower is None:
        raise AdapeftError(
            f"the rule of {method} was not kept in training, nor its budget: call adapeft.follow_rule(model, "
            f"optimizer, num_steps=…) before the first step."
        )
    if not follower.is_ready:
        raise AdapeftError(
            f"{method} has not projected yet: {follower.rule.step} of {follower.num_steps} steps are done. Train on."
        )
    follower.before_evaluation()


@torch.no_grad()
def _change_of(part: DensePart, full_value: Callable[[nn.Parameter], Tensor]) -> Change | None:
    """The change that a dense part has made: the elements that moved under a budget, else the whole tensor."""
    leaves = [full_value(leaf).to("cpu", torch.float32, copy=True) for leaf in part.leaves.values()]
    difference = part.effective(leaves, training=False)
    shape = tuple(difference.shape)
    if part.rule.budget is None:
        return Difference(Part("tensor", shape), difference)
    moved = difference.flatten().nonzero().squeeze(1)
    return Difference(Part("elements", shape, moved), difference.flatten()[moved]) if len(moved) else None
