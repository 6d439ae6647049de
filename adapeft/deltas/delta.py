"""A delta: θ − θ⁰ on the subset, new parameters, and the fingerprint of its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapeft.data.labels import Head
from adapeft.deltas.applied import Applied, install, parts_on_quantized
from adapeft.deltas.header import BaseModelHeader, DeltaHeader
from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_tensors, save_tensors
from adapeft.files.damage import reading
from adapeft.files.json_numbers import dumps, loads
from adapeft.finite import check_finite
from adapeft.model.dense import check_dense, logical_shapes
from adapeft.model.fingerprint import DIGEST_BYTES, RESIZED, Entry, difference_from, entries_of, fingerprint_model
from adapeft.model.wrappers import ATTACHMENT, bare
from adapeft.parts.change import Change
from adapeft.parts.part import Part
from adapeft.parts.registry import by_kind, load_part

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DIGESTS = "base.digests"
_OWN_KEYS = ("parts", "new", "buffers", "fingerprint")


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
        return None if self._base is None else self._base.quantization

    @property
    def head(self) -> Head | None:
        """The head that it was trained with; None if its description has no labels."""
        if self._base is None:
            return None
        labels = self._base.labels
        if labels.id2label:
            return Head.of_labels(labels.id2label, "the delta")
        return None if labels.num_labels is None else Head(labels.num_labels, None, "the delta")

    @property
    def _base(self) -> BaseModelHeader | None:
        """What the description says of the base; None if nothing."""
        header = self.description.get("model")
        return None if header is None else BaseModelHeader.model_validate(loads(dumps(header)))

    def save(self, path: str | Path) -> None:
        """Write ``delta.safetensors``: 5 to 8 bytes per element, 4 in rows and whole tensors, and a header.

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
            DeltaHeader.model_validate(loads(dumps(content)))
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
            header = DeltaHeader.model_validate(content)
            _check_values(path, tensors)
            changes = {}
            for name, entry in header.parts.items():
                part = load_part(path, name, entry, tensors.get(f"{name}.indices"))
                changes[name] = Change(part, _values(path, name, part, tensors))
            new = {name: tensors[f"{name}.new"] for name in header.new}
            buffers = {name: tensors[f"{name}.buffer"] for name in header.buffers}
            rest = {key: value for key, value in content.items() if key not in _OWN_KEYS}
            if header.scores:
                rest["scores"] = header.scores
            check_finite(tensors, str(path), "Its training diverged: train again at a lower learning rate.")
            return cls(changes, new, header.fingerprint, rest, buffers, _digests(path, tensors))

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
        changed -= parts_on_quantized(model, parts).keys()
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

    def add_to(self, model: nn.Module) -> None:
        """Add the delta for good to a model whose weights may be divided by ZeRO-3. Collective for such a model.

        Raises:
            AdapeftError: the model is not the base of the delta.
        """
        self.check_fits(model)
        self.install(model)

    def install(self, model: nn.Module) -> Applied:
        """Apply to a model that was checked before: hashing its weights takes longer than changing some of them."""
        names = self.head.names if self.new and self.head is not None else None
        return install(model, self.changes, {**self.new, **self.buffers}, names)


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
