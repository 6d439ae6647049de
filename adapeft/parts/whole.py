"""Whole parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adapeft.parts.part import Attached, Part, PartAndValues, Site
from adapeft.parts.rule import Ruled


class Whole(Part):
    """All elements of a parameter, which is trained in place."""

    kind = "tensor"
    trains_in_place = True

    def whole_rows(self, num_rows: int) -> Tensor:
        return torch.arange(num_rows)

    def attach(self, site: Site) -> Attached:
        return Attached({"": site.places[0]})

    def extract(self, trained: Sequence[Tensor], base: Tensor | None, ruled: Ruled | None) -> PartAndValues:
        assert base is not None
        return self, trained[0] - base
