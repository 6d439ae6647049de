"""The base class of rows and elements: indices, and a leaf in every module that uses the parameter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from adapeft.errors import AdapeftError
from adapeft.model.places import places_of
from adapeft.parts.gaps import packed
from adapeft.parts.layers.leaves import LeafPart, add_leaves
from adapeft.parts.part import Attached, Part, PartAndValues, PartHeader, Site
from adapeft.parts.rule import DIFFERENCE


@dataclass(frozen=True, eq=False)
class Indexed(Part, LeafPart):
    """Some of a parameter's elements, trained through a leaf: a small parameter that starts at zero.

    Attributes:
        indices: ascending indices, int64.
    """

    indices: Tensor

    is_indexed = True
    adds_to_output = True
    leaf_names = (DIFFERENCE,)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Indexed)
            and self.describe() == other.describe()
            and torch.equal(self.indices.cpu(), other.indices.cpu())
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.shape, len(self.indices)))

    @property
    @abstractmethod
    def limit(self) -> int:
        """Exclusive upper bound of the indices."""

    @property
    def num_indices(self) -> int:
        return len(self.indices)

    @property
    def is_empty(self) -> bool:
        return not len(self.indices)

    @property
    def stored_indices(self) -> Tensor:
        return packed(self.indices, self.limit)

    @classmethod
    def read(cls, header: PartHeader, indices: Tensor | None) -> Self:
        assert indices is not None
        return cls(tuple(header.shape), indices)

    def check(self, path: str | Path, name: str) -> None:
        indices, limit = self.indices, self.limit
        ascending = bool((indices[1:] > indices[:-1]).all()) if indices.ndim == 1 else False
        if not (limit and ascending) or (len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < limit):
            raise AdapeftError(f"{path}: the indices of {name!r} must be 1-D, ascending and from 0 to {limit - 1}.")

    def attach(self, site: Site) -> Attached:
        module, local_name = site.places[0]
        device = module.get_parameter(local_name).device
        leaf = nn.Parameter(torch.zeros(self.value_shape, dtype=torch.float32, device=device))
        added = [add_leaves(module, local_name, self, {DIFFERENCE: leaf}) for module, local_name in site.places]
        return Attached({"": (module, added[0][DIFFERENCE])})

    def install(self, model: nn.Module, name: str, values: Tensor) -> None:
        for module, local_name in places_of(model)[name]:
            device = module.get_parameter(local_name).device
            leaf = nn.Parameter(values.to(device, torch.float32), requires_grad=False)
            add_leaves(module, local_name, self, {DIFFERENCE: leaf})

    def to(self, device: torch.device) -> Self:
        return replace(self, indices=self.indices.to(device))

    def buffers(self, is_linear: bool) -> dict[str, Tensor]:
        return {"indices": self.indices}

    def merged(self, leaves: Sequence[Tensor]) -> PartAndValues:
        return self, leaves[0]
