"""The base class of parts: the trained part of one parameter, or a module after one layer.

Every kind is a class in its own file. It counts its parts' trained elements, reads and writes their description in
files, attaches them to a model, extracts their trained values, and adds these to a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import FiniteFloat, NonNegativeInt, model_validator
from torch import Tensor, nn

from adapeft.files.damage import MOST, Header
from adapeft.model.places import ModulePlace
from adapeft.parts.rule import Rule, Ruled


class PartHeader(Header):
    """Description of a part in a file."""

    kind: str
    shape: list[NonNegativeInt]
    dim: NonNegativeInt
    rank: NonNegativeInt = 0
    alpha: FiniteFloat = 0.0

    @model_validator(mode="after")
    def _can_be_counted(self) -> Self:
        """Check that the element count fits: torch counts in 64 bits and overflows silently."""
        if math.prod(max(size, 1) for size in (*self.shape, self.rank)) > MOST:
            raise ValueError(f"shape {self.shape} and rank {self.rank} are too large for any model")
        return self


class Site(NamedTuple):
    """The location at which a part is attached.

    Attributes:
        model: the model.
        name: name of the part.
        places: all modules that hold the part's parameter; none for a part after a layer.
        seed: random seed of the initial values.
        rule: rule of the dense parts.
    """

    model: nn.Module
    name: str
    places: Sequence[ModulePlace]
    seed: int
    rule: Rule


class Attached(NamedTuple):
    """A part in a model.

    Attributes:
        pieces: trained parameters by piece name; a single piece has the empty name.
        ruled: parameter and rule of a dense part.
    """

    pieces: dict[str, ModulePlace]
    ruled: Ruled | None = None


@dataclass(frozen=True)
class Part:
    """The trained part of one parameter, or a module after one layer.

    Attributes:
        kind: name of the kind in files and tables.
        changes_parameter: whether the trained difference can be added to the parameter that the part is named after;
            otherwise the part is named after a layer, whose output it changes.
        trains_in_place: whether it trains the model's own parameter.
        follows_rule: whether it trains under the rule that the record of the choice names.
        scaling_pieces: tensors of its values to which the added difference is proportional; zero before training.
        is_indexed: whether files hold indices for it.
        adds_to_output: whether it can train next to a quantized weight, by what it adds to the layer's output.
        shape: shape of the parameter; the width of the layer for a part after a layer.
    """

    kind: ClassVar[str]
    changes_parameter: ClassVar[bool] = True
    trains_in_place: ClassVar[bool] = False
    follows_rule: ClassVar[bool] = False
    scaling_pieces: ClassVar[tuple[str, ...]] = ("values",)
    is_indexed: ClassVar[bool] = False
    adds_to_output: ClassVar[bool] = False

    shape: tuple[int, ...]

    # --- counting ---

    @property
    def count(self) -> int:
        """Number of trained elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def num_indices(self) -> int:
        """Number of indices of the trained elements; 0 for the whole parameter."""
        return 0

    @property
    def is_empty(self) -> bool:
        """Whether it trains nothing, judged by its indices alone."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of its float32 values and its indices in a file."""
        indices = self.stored_indices
        return 4 * self.count + (0 if indices is None else indices.nbytes)

    def mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return which elements of the flattened parameter in [start, stop) are trained: bool [stop - start]."""
        stop = torch.Size(self.shape).numel() if stop is None else stop
        return torch.ones(stop - start, dtype=torch.bool)

    def whole_rows(self, num_rows: int) -> Tensor:
        """Return the output neurons, of ``num_rows`` of the matrix, that it trains whole: int64."""
        return torch.empty(0, dtype=torch.int64)

    # --- files ---

    def describe(self) -> dict[str, Any]:
        """Return the description for the header of a file: everything except the indices."""
        return {"kind": self.kind, "shape": self.shape, "dim": 0}

    @classmethod
    def read(cls, header: PartHeader, indices: Tensor | None) -> Self:
        """Return the part of a description; the inverse of ``describe``. ``check`` validates it."""
        return cls(tuple(header.shape))

    def check(self, path: str | Path, name: str) -> None:
        """Check a part that was read from a file.

        Raises:
            AdapeftError: its fields are invalid or contradict each other.
        """

    @property
    def stored_indices(self) -> Tensor | None:
        """The indices in the form in which a file stores them."""
        return None

    @property
    def pieces(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that the part adds to the model, by name; empty if it adds none."""
        return {}

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of its values: that of its leaf or of the parameter; [count] for several pieces."""
        return self.shape

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that store its values in a file, by name."""
        return {"values": self.value_shape}

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Return the tensors that store ``values`` in a file, by name."""
        return {"values": values}

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the values of the stored tensors; the inverse of ``split``."""
        return tensors[0]

    # --- in a model ---

    @classmethod
    def check_layers(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Check that the parts of this kind fit the layers of ``model``, before anything is attached.

        Raises:
            AdapeftError: a part does not fit.
        """

    @classmethod
    def prepare(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Change the layers of all ``parts`` of this kind together, if ``attach`` needs it.

        Raises:
            AdapeftError: a layer cannot be changed; the model is unchanged.
        """

    def attach(self, site: Site) -> Attached:
        """Attach the part to a model. All parts are attached in the order of their subset, after ``prepare``."""
        raise NotImplementedError(self.kind)

    @classmethod
    def remove(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Remove everything that ``prepare``, ``attach`` and ``install`` added for these parts, except leaves."""

    @classmethod
    def switch(cls, model: nn.Module, parts: Mapping[str, Self], on: bool) -> None:
        """Make the layers use what ``attach`` added for these parts, except leaves, or compute without it."""

    def install(self, model: nn.Module, name: str, values: Tensor) -> None:
        """Add a trained part to a model for inference, after ``prepare``, if it cannot be added to the parameter."""
        raise NotImplementedError(self.kind)

    def extract(self, trained: Sequence[Tensor], base: Tensor | None, ruled: Ruled | None) -> PartAndValues | None:
        """Return the trained change as a part and its values; None if nothing changed.

        Args:
            trained: full trained parameters in the order of ``Attached.pieces``, float32.
            base: parameter before training, if the part trains in place.
            ruled: ``Attached.ruled`` from ``attach``.
        """
        return self, self.joined(trained)

    # --- the trained difference of a parameter ---

    def difference(self, values: Tensor) -> Tensor:
        """Return the difference that ``values`` add to the entries returned by ``touched``, in their shape."""
        return values

    def touched(self, parameter: Tensor) -> Tensor:
        """Return a copy of the entries of ``parameter`` that training changes."""
        return parameter.detach().clone()

    def put_back(self, parameter: Tensor, entries: Tensor) -> None:
        """Restore the entries that ``touched`` returned, bit for bit."""
        parameter.copy_(entries)

    def gather(self, dense: Tensor) -> Tensor:
        """Return the part's entries of a tensor of the parameter's shape, in ``value_shape``."""
        return dense

    def entries(self, values: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return ascending positions in the flattened parameter, int64 [count], and the difference at each, [count].

        The positions are None if the part covers the whole parameter.
        """
        return None, self.difference(values).flatten()

    @classmethod
    def sum_of(cls, terms: Sequence[tuple[float, Self, Tensor]]) -> PartAndValues | None:
        """Return Σ weight · difference as a part of the same kind; None if that is impossible or does not pay.

        Args:
            terms: weights, parts of this kind on one parameter, and their values.
        """
        return None

    def to(self, device: torch.device) -> Self:
        """Return the part with its tensors on ``device``."""
        return self


def mask_of(part: Part | None, start: int, stop: int) -> Tensor:
    """Return ``part.mask(start, stop)``, of a part that a subset may not have: then no element is trained."""
    return torch.zeros(stop - start, dtype=torch.bool) if part is None else part.mask(start, stop)


PartAndValues = tuple[Part, Tensor]
"""A part and its values [``value_shape``]."""


@dataclass(frozen=True)
class AddedPart(Part):
    """A part that adds several parameters to the model; its values are the concatenation of these pieces."""

    @property
    def count(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.pieces.values())

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (self.count,)

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.pieces

    def split(self, values: Tensor) -> dict[str, Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self.pieces.values()]
        cuts = zip(self.pieces.items(), values.split(sizes), strict=True)
        return {name: piece.view(shape) for (name, shape), piece in cuts}

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors])
