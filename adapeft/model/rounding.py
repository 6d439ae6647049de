"""Detection and warnings of changes that are lost by rounding to the dtype of a model's weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapeft.errors import RoundingWarning
from adapeft.model.divided import shape_of


@dataclass(frozen=True)
class Rounding:
    """Rounding losses among the entries that a delta changes.

    Attributes:
        entries: number of nonzero differences on weights in fewer than 32 bits.
        lost: number of these that leave the weight unchanged.
        dtype: dtype of the weights.
    """

    entries: int = 0
    lost: int = 0
    dtype: torch.dtype | None = None

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.entries + other.entries, self.lost + other.lost, self.dtype or other.dtype)

    @classmethod
    def between(cls, before: Tensor, after: Tensor, difference: Tensor) -> Rounding:
        """Compare entries before and after ``difference`` was added to them; all have the same shape."""
        if not is_coarse(after.dtype):
            return cls()
        asked = difference != 0
        return cls(int(asked.sum()), int((asked & (before == after)).sum()), after.dtype)

    def message(self, remedy: str) -> str:
        """Return a message on the lost entries; empty if none were lost."""
        if not self.lost:
            return ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.lost:,} of the delta's {self.entries:,} entries are lost: they are too small to change a weight in "
            f"{dtype}. {remedy}"
        )

    def warn(self, remedy: str) -> None:
        """Warn about lost entries, if any; ``remedy`` is a sentence."""
        if self.lost:
            warnings.warn(self.message(remedy), RoundingWarning, stacklevel=3)


def is_coarse(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype have less precision than the 24 bits of a delta's float32 values."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


def warn_of_coarse_training(parameters: Mapping[str, Tensor]) -> None:
    """Warn about ``parameters`` that are trained in a dtype too coarse for small steps."""
    coarse = {name: parameter for name, parameter in parameters.items() if is_coarse(parameter.dtype)}
    if not coarse:
        return
    name, parameter = next(iter(coarse.items()))
    count = sum(torch.Size(shape_of(parameter)).numel() for parameter in coarse.values())
    dtype = str(parameter.dtype).removeprefix("torch.")
    warnings.warn(
        f"{len(coarse)} whole tensors with {count:,} parameters, such as {name!r}, are trained in {dtype}: a step "
        f"below {torch.finfo(parameter.dtype).eps / 2:.2g} of a weight is rounded away, unless the optimizer keeps "
        f"float32 copies, as DeepSpeed's optimizers do. Load the model in float32 to keep such steps, or train rows or "
        f"elements, which are float32 for any base dtype.",
        RoundingWarning,
        stacklevel=3,
    )
