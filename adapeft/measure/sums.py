"""Sums in float64 over large tensors, a part at a time.

torch converts a whole tensor before it sums it in another type: of MiniLM's embedding that took 235 MB next to 47.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SIZE = 2**20
"""Elements of a part."""


def parts_of(start: int, *values: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield parts of flat tensors of equal length, each with its position if the tensors begin at ``start``."""
    for index, parts in enumerate(zip(*(value.split(_SIZE) for value in values), strict=True)):
        yield start + index * _SIZE, parts


def sum_of(values: Tensor) -> Tensor:
    """Return the sum of a flat tensor, float64 []."""
    return torch.stack([part.sum(dtype=torch.float64) for part in values.split(_SIZE)]).sum()


def sum_of_squares(values: Tensor) -> Tensor:
    """Return the sum of the squares of a flat tensor, float64 []."""
    return torch.stack([part.double().square().sum() for part in values.split(_SIZE)]).sum()
