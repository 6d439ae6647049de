"""A delta: θ − θ⁰ on the subset, new parameters, and the fingerprint of its base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, FiniteFloat
from torch import Tensor, nn

from adapeft.data.labels import Head
from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_tensors, save_tensors
from adapeft.files.damage import Header, Line, reading
from adapeft.files.json_numbers import Number, dumps, loads
from adapeft.finite import DIVERGED, check_finite
from adapeft.model.dense import check_dense, check_resident, logical_shapes
from adapeft.model.divided import full_value as whole_value
from adapeft.model.divided import unsharded
from adapeft.model.fingerprint import DIGEST_BYTES, RESIZED, Entry, difference_from, entries_of, fingerprint_model
from adapeft.model.load import describe_model
from adapeft.model.quantized import check_not_whole, quantized_weights
from adapeft.model.rounding import Rounding
from adapeft.model.wrappers import ATTACHMENT, bare, unwrap
from adapeft.parts.change import Change
from adapeft.parts.layers.leaves import remove_leaves
from adapeft.parts.part import Part
from adapeft.parts.registry import by_kind, load_part
from adapeft.parts.whole import Whole
from adapeft.tasks.registry import TaskName
from adapeft.tune.attachment import Attachment, Owner, attachment_of
from adapeft.tune.buffers import changed_buffers
from adapeft.tune.check import check_in_place, check_moved, check_reached
from adapeft.tune.frozen import check_frozen

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOST_LABELS = 2**20
"""Limit on labels, because transformers builds a dictionary with one name per label."""
_DIGESTS = "base.digests"
_OWN_KEYS = ("parts", "new", "buffers", "fingerprint")


@dataclass
class Applied:
    """A delta that was added to a model's weights, with the base entries that it replaced."""

    model: nn.Module
    _changes: list[tuple[Change, Tensor, Tensor]]
    _whole: list[tuple[Tensor, Tensor]]
    _installed: dict[str, Part]
    _labels: dict[str, Any]

    @torch.no_grad()
    def revert(self) -> None:
        """Remove the delta; the weights are bit-identical to before."""
        for change, parameter, entries in self._changes:
            change.put_back(parameter, entries)
        for place, value in self._whole:
            place.copy_(value)
        for kind, parts in reversed(by_kind(self._installed)):
            kind.remove(self.model, parts)
        if any(part.is_indexed for part in self._installed.values()):
            for module in self.model.modules():
                remove_leaves(module)
        config: Any = getattr(self.model, "config", None)
        for key, value in self._labels.items():
            setattr(config, key, value)
        self._changes, self._whole, self._installed = [], [], {}


class _Labels(Header):
    """Only the keys of ``label_options``: transformers takes any other key, such as trust_remote_code, as an option."""

    model_config = ConfigDict(extra="forbid")

    num_labels: Annotated[int, Field(ge=1, le=_MOST_LABELS)] | None = None
    id2label: dict[str, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None


class _Model(Header):
    name: Line | None = None
    architecture: Line | None = None
    task: TaskName | None = None
    labels: _Labels = _Labels()
    quantization: Line | None = None


class _Source(Header):
    name: Line
    weight: FiniteFloat


class _Header(Header):
    """Keys of the description that the code uses. Others are free."""

    parts: dict[Line, dict[str, Any]]
    new: list[Line]
    buffers: list[Line] = []
    fingerprint: Line
    method: Line | None = None
    scores: dict[Line, Number] = {}
    model: _Model | None = None
    sources: list[_Source] = []


@dataclass(frozen=True)
class Delta:
    """Trained differences to a base model, new parameters, and buffers.

    Attributes:
        changes: differences to the base by name of the parameter, adapters by name of their layer.
        new: values of parameters that the base does not have (a head).
        fingerprint: fingerprint of the base.
        description: free metadata, such as method, budget, scores and config.
        buffers: values of the base's buffers that training changed, such as running statistics, in their own dtypes.
        digests: digests of the base's parameters, to name those in which another base differs; None in older files.
    """

    changes: Mapping[str, Change]
    new: Mapping[str, Tensor]
    fingerprint: str
    description: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    digests: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of changed elements of the base; for LoRA and adapters, of the elements that they add."""
        return sum(change.values.numel() for change in self.changes.values())

    @property
    def quantization(self) -> str | None:
        """Type of the base's quantized weights, such as ``nf4``; None if it was not quantized."""
        said = self.description.get("model")
        return None if said is None else _Model.model_validate(loads(dumps(said))).quantization

    @property
    def head(self) -> Head | None:
        """The head that it was trained with; None if its description has no labels."""
        said = self.description.get("model")
        if said is None:
            return None
        labels = _Model.model_validate(loads(dumps(said))).labels
        if labels.id2label:
            return Head.of_labels(labels.id2label, "the delta")
        return None if labels.num_labels is None else Head(labels.num_labels, None, "the delta")

    def save(self, path: str | Path) -> None:
        """Write ``delta.safetensors``: 8 bytes per element, 4 in rows and whole tensors, and a header.

        Raises:
            AdapeftError: a value is not finite, or ``description`` has an invalid value under a key that ``load`` uses.
        """
        self.check_finite(str(path), "Train again at a lower learning rate, or in float32; it is not saved.")
        tensors, parts = {}, {}
        for name, change in self.changes.items():
            parts[name] = change.part.describe()
            tensors.update({f"{name}.{piece}": value.contiguous() for piece, value in change.tensors.items()})
            indices = change.part.stored_indices
            if indices is not None:
                tensors[f"{name}.indices"] = indices
        for name, value in self.new.items():
            tensors[f"{name}.new"] = value
        tensors.update({f"{name}.buffer": value for name, value in self.buffers.items()})
        if self.digests is not None:
            tensors[_DIGESTS] = self.digests
        own = {"parts": parts, "new": list(self.new), "buffers": list(self.buffers), "fingerprint": self.fingerprint}
        content = {**self.description, **own}
        with reading("the delta's description cannot be saved", "Put it under another key."):
            _Header.model_validate(loads(dumps(content)))
        save_tensors(Path(path), "delta", tensors, content)

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read ``delta.safetensors``.

        Raises:
            AdapeftError: the file is not a delta or is truncated, its tensors do not match their description, or values
                are not finite.
        """
        tensors, content = load_tensors(Path(path), "delta")
        with reading(f"{path}: damaged description of a delta", "Get a new copy from where it was made."):
            said = _Header.model_validate(content)
            _check_values(path, tensors)
            changes = {}
            for name, entry in said.parts.items():
                part = load_part(path, name, entry, tensors.get(f"{name}.indices"))
                changes[name] = Change(part, _values(path, name, part, tensors))
            new = {name: tensors[f"{name}.new"] for name in said.new}
            buffers = {name: tensors[f"{name}.buffer"] for name in said.buffers}
            rest = {key: value for key, value in content.items() if key not in _OWN_KEYS}
            if said.scores:
                rest["scores"] = said.scores
            check_finite(tensors, str(path), "Its training diverged: train again at a lower learning rate.")
            return cls(changes, new, said.fingerprint, rest, buffers, _digests(path, tensors))

    def check_finite(self, owner: str, remedy: str) -> None:
        """Check that every value is finite.

        Args:
            owner: start of the message.
            remedy: last sentence of the message.

        Raises:
            AdapeftError: a value is not finite. Names the first such parameter.
        """
        changed = {name: change.values for name, change in self.changes.items()}
        check_finite([*changed.items(), *self.new.items(), *self.buffers.items()], owner, remedy)

    def check_fits(self, model: nn.Module) -> None:
        """Check names, shapes and fingerprint against ``model``.

        Raises:
            AdapeftError: architecture, shapes or base differ.
        """
        self.check_shapes(model)
        self.check_fingerprint(fingerprint_model(model, self.new), entries_of(model, self.new))

    def check_shapes(self, model: nn.Module) -> None:
        """Check names and shapes against ``model``, which may be on the meta device.

        Raises:
            AdapeftError: architecture or shapes differ, or a parameter cannot be changed.
        """
        changed = {*self.changes, *self.new}
        parts = {name: change.part for name, change in self.changes.items()}
        changed -= _beside(model, parts).keys()
        check_dense("Delta.apply", [entry for entry in model.named_parameters() if entry[0] in changed])
        shapes = logical_shapes(model)
        wanted = {name: part.shape for name, part in parts.items() if part.changes_parameter}
        wanted |= {name: tuple(value.shape) for name, value in self.new.items()}
        for name, shape in wanted.items():
            if shapes.get(name) != shape:
                found = shapes.get(name)
                is_longer = found is not None and len(found) == len(shape) > 1 and found[1:] == shape[1:]
                raise AdapeftError(
                    f"the delta changes {name!r} of shape {shape}; this model has {found or 'nothing'} there."
                    f"{is_longer * f' {RESIZED}'}"
                )
        buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
        for name, value in self.buffers.items():
            if buffers.get(name) != tuple(value.shape):
                raise AdapeftError(
                    f"the delta replaces the buffer {name!r} of shape {tuple(value.shape)}; this model has "
                    f"{buffers.get(name, 'none of this name')}."
                )
        for kind, behind in by_kind({name: part for name, part in parts.items() if not part.changes_parameter}):
            kind.check_layers(model, behind)

    def check_fingerprint(self, found: str, entries: Iterable[Entry]) -> None:
        """Check the fingerprint of a base.

        Args:
            found: fingerprint of the base.
            entries: its parameters, read only on a mismatch, to name those that differ.

        Raises:
            AdapeftError: the delta belongs to another base.
        """
        if found != self.fingerprint:
            difference = "" if self.digests is None else difference_from(self.digests, entries)
            if self.quantization:
                difference = f"It was trained on weights quantized to {self.quantization}. {difference}".strip()
            raise AdapeftError(
                f"the delta belongs to a base model of fingerprint {self.fingerprint[:12]}, this one has {found[:12]}: "
                f"apply it to the base it was trained on.{difference and f' {difference}'}"
            )

    def apply(self, model: nn.Module) -> Applied:
        """Add the delta to the model's weights in place; ``revert()`` of the result removes it.

        Adapters become modules of the model, in float32.

        Args:
            model: base of the delta, which may be compiled or wrapped.

        Raises:
            AdapeftError: the model is not the base of the delta, is sharded, or has a subset attached.
        """
        model = bare(model, "Delta.apply")
        if hasattr(model, ATTACHMENT):
            raise AdapeftError(
                "the model has a subset attached, whose trained values would mix with the delta: call "
                "adapeft.detach(model) first, or apply the delta to a fresh copy of the base."
            )
        self.check_fits(model)
        return self.install(model)

    @torch.no_grad()
    def install(self, model: nn.Module) -> Applied:
        """Apply to a model that was checked before: hashing its weights takes longer than changing some of them."""
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        parts = {name: change.part for name, change in self.changes.items()}
        beside = _beside(model, parts)
        behind = {name: part for name, part in parts.items() if not part.changes_parameter} | beside
        in_place = {name: change for name, change in self.changes.items() if name not in behind}
        undo = [(change, parameters[name], change.touched(parameters[name])) for name, change in in_place.items()]
        places = {**parameters, **dict(model.named_buffers())}
        whole = {**self.new, **self.buffers}
        replaced = [(places[name], places[name].detach().clone()) for name in whole]
        try:
            added = (one.add_to(name, *rest) for name, (one, *rest) in zip(in_place, undo, strict=True))
            rounding = sum(added, Rounding())
        except AdapeftError:
            Applied(model, undo, [], {}, {}).revert()
            raise
        rounding.warn("Load the base in float32 to keep them.")
        required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        for kind, own in by_kind(behind):
            kind.prepare(model, own)
            for name, part in own.items():
                part.install(model, name, self.changes[name].values)
        for parameter, required in required_grad.items():
            parameter.requires_grad_(required)  # PEFT freezes all parameters
        for name, value in whole.items():
            places[name].copy_(value)
        return Applied(model, undo, replaced, behind, self._name_outputs(model))

    def _name_outputs(self, model: nn.Module) -> dict[str, Any]:
        """Set the class names of the delta's head in the model's config, and return the previous ones."""
        names = self.head.names if self.new and self.head is not None else None
        config: Any = getattr(model, "config", None)
        if names is None or config is None:
            return {}
        had = {"id2label": config.id2label, "label2id": config.label2id}
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        return had


def _beside(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Part]:
    """Return the parts on quantized weights, which are installed next to them.

    Raises:
        AdapeftError: a part replaces the whole of a quantized weight.
    """
    quantized = quantized_weights(model)
    check_not_whole("Delta.apply", [name for name, part in parts.items() if not part.adds_to_output], quantized)
    return {name: part for name, part in parts.items() if name in quantized}


def _digests(path: str | Path, tensors: Mapping[str, Tensor]) -> Tensor | None:
    found = tensors.get(_DIGESTS)
    if found is not None and (found.dtype != torch.uint8 or found.ndim != 2 or found.shape[1] != DIGEST_BYTES):
        raise AdapeftError(
            f"{path}: {_DIGESTS!r} holds {found.dtype} {tuple(found.shape)}, not uint8 [count, {DIGEST_BYTES}]."
        )
    return found


def _check_values(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that all tensors except indices, buffers and digests are floats.

    Raises:
        AdapeftError: a tensor has another dtype.
    """
    for name, value in tensors.items():
        if name != _DIGESTS and not name.endswith((".indices", ".buffer")) and value.dtype not in _DTYPES:
            raise AdapeftError(f"{path}: {name!r} holds {value.dtype}, not float32.")


def _values(path: str | Path, name: str, part: Part, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the values of a part from the tensors of a file.

    Raises:
        AdapeftError: their shapes are not those of the part.
    """
    found = []
    for piece, shape in part.stored_shapes.items():
        value = tensors[f"{name}.{piece}"]
        if tuple(value.shape) != tuple(shape):
            raise AdapeftError(f"{path}: {name!r} has {piece} of shape {tuple(value.shape)}, not {tuple(shape)}.")
        found.append(value)
    return part.joined(found)


def extract_delta(
    model: nn.Module,
    description: Mapping[str, Any] | None = None,
    full_value: Callable[[nn.Parameter], Tensor] = whole_value,
) -> Delta:
    """Return the delta of a model that has a subset attached. Collective if a trainer sharded the model over ranks.

    Args:
        model: model after ``attach`` and training, as it is or wrapped by a trainer.
        description: metadata for the file's header; its keys override those that describe the model.
        full_value: function that returns a whole trained parameter in float32; the default also gathers the shards of
            FSDP and ZeRO.

    Raises:
        AdapeftError: nothing is attached, or a trained parameter was frozen, removed or replaced since, or has never
            received a gradient.
    """
    inner = unwrap(model)
    check_resident(inner, "delta")
    attachment = attachment_of(inner)
    check_in_place(inner, attachment)
    with unsharded(model), _as_shipped(attachment):
        check_frozen(inner, attachment)
        changes, new = _trained(attachment, full_value)
    of_base = [name for name in attachment.owners if name not in attachment.subset.new]
    moved = {name: name in changes and changes[name].has_moved for name in of_base}
    check_moved(attachment, moved)
    check_reached(attachment, moved)
    buffers = changed_buffers(inner, attachment.buffers)
    described = {"model": describe_model(inner), **(description or {})}
    delta = Delta(changes, new, attachment.fingerprint, described, buffers, attachment.digests)
    delta.check_finite(DIVERGED, "Train again at a lower learning rate, or in float32.")
    return delta


def _trained(
    attachment: Attachment, full_value: Callable[[nn.Parameter], Tensor]
) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """Return the changes of the base and the new parameters."""
    changes: dict[str, Change] = {}
    new: dict[str, Tensor] = {}
    for name, owners in attachment.owners.items():
        pieces = attachment.pieces(name)
        values = [_read(name, owner, pieces[piece], full_value) for piece, owner in owners.items()]
        if name in attachment.subset.new:
            new[name] = values[0]
            continue
        part = attachment.subset.parts.get(name) or Whole(owners[""].shape)
        found = part.extract(values, attachment.base.get(name), attachment.dense.get(name))
        if found is not None:
            changes[name] = Change(*found)
    return changes, new


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
