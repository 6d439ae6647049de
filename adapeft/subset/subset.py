"""A subset: the parameters to train. Saved as safetensors; whole tensors are stored by name only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from adapeft.errors import AdapeftError, did_you_mean
from adapeft.files.artifact import load_tensors, save_tensors
from adapeft.files.damage import Header, Line, reading
from adapeft.files.json_numbers import dumps
from adapeft.model.dense import logical_shapes
from adapeft.parts.part import Part
from adapeft.parts.registry import load_part
from adapeft.subset.choice import Choice
from adapeft.subset.entry import Summary
from adapeft.subset.locate import locate


class _SubsetHeader(Header):
    """Header of a file, without the record of the choice."""

    parts: dict[Line, dict[str, Any]]
    always_train: list[Line]
    new: list[Line]


@dataclass(frozen=True)
class Subset:
    """The parameters to train.

    Attributes:
        parts: parts chosen within the budget, by name of a parameter; adapters by name of a layer.
        always_train: names of the parameters outside the budget that are trained whole (a new head).
        new: names of those in ``always_train`` that no base checkpoint holds.
        choice: record of the choice.
    """

    parts: Mapping[str, Part]
    always_train: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    choice: Choice = field(default_factory=Choice)

    @property
    def count(self) -> int:
        """Number of trained elements within the budget."""
        return sum(part.count for part in self.parts.values())

    @property
    def digest(self) -> str:
        """Hash of everything that decides what trained values mean, also their order."""
        parts = [(name, part.describe()) for name, part in self.parts.items()]
        digest = hashlib.sha256(dumps([parts, self.always_train, self.new, self.choice.rule]).encode())
        for part in self.parts.values():
            if (indices := part.stored_indices) is not None:
                digest.update(indices.cpu().numpy().tobytes())
        return digest.hexdigest()

    def of_model(self, always_train: tuple[str, ...], new: tuple[str, ...]) -> Subset:
        """Return a copy with the parameters outside the budget."""
        return replace(self, always_train=always_train, new=new)

    def described(self, **more: Any) -> Subset:
        """Return a copy with these fields of ``choice`` set."""
        return replace(self, choice=self.choice.with_values(**more))

    def check_fits(self, model: nn.Module) -> None:
        """Check names and shapes of parameters against ``model``; ``attach`` checks the layers of adapters.

        Raises:
            AdapeftError: a parameter is missing or has another shape.
        """
        shapes = logical_shapes(model)
        matched = {name: part for name, part in self.parts.items() if part.changes_parameter}
        for name in (*matched, *self.always_train):
            if name not in shapes:
                hint = did_you_mean(name, shapes)
                raise AdapeftError(f"the subset trains {name!r}, which is not in this model.{hint}")
        for name, part in matched.items():
            if part.shape != shapes[name]:
                raise AdapeftError(
                    f"{name!r} has shape {part.shape} in the subset, but {shapes[name]} in this model: the subset was "
                    f"chosen for another model."
                )

    def summary(self, config: str | None = None, metrics: Mapping[str, Any] | None = None) -> Summary:
        """Return the summary for a store's entry; see ``Summary.of`` for the arguments and errors."""
        return Summary.of(self.choice, self.count, config, metrics)

    def save(self, path: str | Path) -> None:
        """Write ``subset.safetensors``."""
        parts = {name: part.describe() for name, part in self.parts.items()}
        stored = {name: part.stored_indices for name, part in self.parts.items()}
        indices = {name: tensor for name, tensor in stored.items() if tensor is not None}
        content = {"parts": parts, "always_train": self.always_train, "new": self.new, **self.choice.recorded()}
        save_tensors(Path(path), "subset", indices, content)

    @classmethod
    def load(cls, path: str | Path) -> Subset:
        """Read ``subset.safetensors``; ``path`` may also be a URL or a name in the store (see ``locate``).

        Raises:
            AdapeftError: there is no such subset, the file is not a subset or is truncated, or indices do not fit their
                shapes.
        """
        indices, content = load_tensors(locate(path), "subset")
        with reading(f"{path}: damaged description of a subset", "Choose again."):
            header = _SubsetHeader.model_validate(content)
            parts = {name: load_part(path, name, entry, indices.get(name)) for name, entry in header.parts.items()}
            rest = {key: value for key, value in content.items() if key not in _SubsetHeader.model_fields}
            return cls(parts, tuple(header.always_train), tuple(header.new), Choice.model_validate(rest))
