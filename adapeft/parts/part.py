"""A part: what is trained of one parameter, or behind one layer. Every kind is a class in a file of its own.

A kind knows all there is to know of its parts: how many elements they train and how a file describes them, how they go
into a model and what of it they train, and what their training adds to a weight.
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
    """What a file says of a part."""

    kind: str
    shape: list[NonNegativeInt]
    dim: NonNegativeInt
    rank: NonNegativeInt = 0
    alpha: FiniteFloat = 0.0

    @model_validator(mode="after")
    def _can_be_counted(self) -> Self:
        """torch counts in 64 bits and wraps round without a word."""
        if math.prod(max(size, 1) for size in (*self.shape, self.rank)) > MOST:
            raise ValueError(f"shape {self.shape} and rank {self.rank} are of no model")
        return self


class Site(NamedTuple):
    """Where a part is attached.

    Attributes:
        model: the model.
        name: of the part.
        places: every module that holds the part's parameter; none for a part behind a layer.
        seed: random seed of the values that training starts from.
        rule: of the dense parts.
    """

    model: nn.Module
    name: str
    places: Sequence[ModulePlace]
    seed: int
    rule: Rule


class Attached(NamedTuple):
    """A part in a model.

    Attributes:
        pieces: the trained parameters by their own names; one under the empty name where it needs none.
        ruled: the parameter and its rule, of a dense part.
    """

    pieces: dict[str, ModulePlace]
    ruled: Ruled | None = None


@dataclass(frozen=True)
class Part:
    """What is trained of one parameter, or behind one layer.

    Attributes:
        kind: name of the kind in files and tables.
        changes_parameter: whether what is trained can be added to the parameter whose name the part has; otherwise the
            name is that of a layer, whose output it changes.
        trains_in_place: whether it trains the model's own parameter.
        follows_rule: whether it trains under the rule that ``Subset.description`` names.
        scaling_pieces: the tensors of its values that what it adds is proportional to, zero before training.
        is_indexed: whether a file holds indices of it.
        shape: of the parameter; the width of the layer for a part behind one.
    """

    kind: ClassVar[str]
    changes_parameter: ClassVar[bool] = True
    trains_in_place: ClassVar[bool] = False
    follows_rule: ClassVar[bool] = False
    scaling_pieces: ClassVar[tuple[str, ...]] = ("values",)
    is_indexed: ClassVar[bool] = False

    shape: tuple[int, ...]

    # --- counting ---

    @property
    def count(self) -> int:
        """Number of trained elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def num_indices(self) -> int:
        """Number of indices that say which elements are trained; 0 for the whole parameter."""
        return 0

    @property
    def is_empty(self) -> bool:
        """Whether it trains nothing, according to its indices alone."""
        return False

    @property
    def num_bytes(self) -> int:
        """Bytes of its float32 values and its indices in a file."""
        indices = self.stored_indices
        return 4 * self.count + (0 if indices is None else indices.nbytes)

    def mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Which elements of the flattened parameter, from ``start`` to before ``stop``, are trained.

        Returns:
            bool [stop - start].
        """
        stop = torch.Size(self.shape).numel() if stop is None else stop
        return torch.ones(stop - start, dtype=torch.bool)

    def whole_rows(self, num_rows: int) -> Tensor:
        """int64: which of the ``num_rows`` output neurons of its matrix it trains whole."""
        return torch.empty(0, dtype=torch.int64)

    # --- files ---

    def describe(self) -> dict[str, Any]:
        """All but the indices, for the header of a file."""
        return {"kind": self.kind, "shape": self.shape, "dim": 0}

    @classmethod
    def read(cls, header: PartHeader, indices: Tensor | None) -> Self:
        """The inverse of ``describe``; ``check`` says whether the numbers go together."""
        return cls(tuple(header.shape))

    def check(self, path: str | Path, name: str) -> None:
        """Checks what was read from a file.

        Raises:
            AdapeftError: the numbers do not go together.
        """

    @property
    def stored_indices(self) -> Tensor | None:
        """The indices as a file holds them."""
        return None

    @property
    def pieces(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that the part adds to the model, by name; none where it trains what is there."""
        return {}

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of its values: of its leaf, or of the parameter; [count] where they are several pieces."""
        return self.shape

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that hold its values in a file, by name."""
        return {"values": self.value_shape}

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """The tensors that hold ``values`` in a file, by name."""
        return {"values": values}

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        return tensors[0]

    # --- in a model ---

    @classmethod
    def check_layers(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Checks that the parts of this kind go with the layers of ``model``, before anything is attached.

        Raises:
            AdapeftError: one does not.
        """

    @classmethod
    def prepare(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Changes the layers of all ``parts`` of this kind together, where ``attach`` needs that.

        Raises:
            AdapeftError: a layer cannot be changed; the model is as before.
        """

    def attach(self, site: Site) -> Attached:
        """Puts the part into a model. All parts are attached in the order of their subset, after ``prepare``."""
        raise NotImplementedError(self.kind)

    @classmethod
    def remove(cls, model: nn.Module, parts: Mapping[str, Self]) -> None:
        """Removes what ``prepare``, ``attach`` and ``install`` have added for parts of this kind, except leaves."""

    def install(self, model: nn.Module, name: str, values: Tensor) -> None:
        """Puts a trained part into a model that is not trained, where it cannot be added to a parameter."""
        raise NotImplementedError(self.kind)

    def extract(self, trained: Sequence[Tensor], base: Tensor | None, ruled: Ruled | None) -> PartAndValues | None:
        """What training has changed, as a part and its values; None where it changed nothing.

        Args:
            trained: the trained parameters in the order of ``Attached.pieces``, whole, float32.
            base: the parameter before training, where it trains in place.
            ruled: what ``attach`` returned.
        """
        return self, self.joined(trained)

    # --- what training adds to a parameter ---

    def difference(self, values: Tensor) -> Tensor:
        """What ``values`` add to the entries that ``touched`` returns, in their shape."""
        return values

    def touched(self, parameter: Tensor) -> Tensor:
        """A copy of the entries of ``parameter`` that training changes."""
        return parameter.detach().clone()

    def put_back(self, parameter: Tensor, entries: Tensor) -> None:
        """Writes what ``touched`` returned, bit for bit."""
        parameter.copy_(entries)

    def gather(self, dense: Tensor) -> Tensor:
        """The entries of a tensor of the parameter's shape, in ``value_shape``."""
        return dense

    def entries(self, values: Tensor) -> tuple[Tensor | None, Tensor]:
        """Positions in the flattened parameter, int64 [count] ascending, and what ``values`` add to each, [count].

        The positions are None for all of them.
        """
        return None, self.difference(values).flatten()

    @classmethod
    def sum_of(cls, terms: Sequence[tuple[float, Self, Tensor]]) -> PartAndValues | None:
        """Σ weight · what the values of a part add, as a part of the same kind; None where that does not pay.

        Args:
            terms: weights, parts of this kind on one parameter, and their values.
        """
        return None

    def to(self, device: torch.device) -> Self:
        """The same part with its tensors on ``device``."""
        return self


PartAndValues = tuple[Part, Tensor]
"""A part, and values of it [``value_shape``]."""


@dataclass(frozen=True)
class AddedPart(Part):
    """A part that adds several parameters to the model; its values are these pieces one after another."""

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
