"""What the dtype of a model's weights is too coarse for: counted, and said in one place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapeft.errors import RoundingWarning


@dataclass(frozen=True)
class Rounding:
    """Of the entries that a delta changes.

    Attributes:
        entries: those whose difference is not zero, of weights in fewer than 32 bits.
        lost: those of them that leave the weight as it was.
        dtype: of the weights.
    """

    entries: int = 0
    lost: int = 0
    dtype: torch.dtype | None = None

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(self.entries + other.entries, self.lost + other.lost, self.dtype or other.dtype)

    @classmethod
    def between(cls, before: Tensor, after: Tensor, difference: Tensor) -> Rounding:
        """Compares entries before and after ``difference`` was added to them, all of one shape."""
        if not is_coarse(after.dtype):
            return cls()
        asked = difference != 0
        return cls(int(asked.sum()), int((asked & (before == after)).sum()), after.dtype)

    def message(self, remedy: str) -> str:
        """What was lost, for a person; empty where nothing was."""
        if not self.lost:
            return ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.lost:,} of the delta's {self.entries:,} entries are lost: they are too small to change a weight in "
            f"{dtype}. {remedy}"
        )

    def warn(self, remedy: str) -> None:
        """Warns of what was lost, with a sentence that says what to do."""
        if self.lost:
            warnings.warn(self.message(remedy), RoundingWarning, stacklevel=3)


def is_coarse(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are rounded to fewer than the 24 bits in which deltas are kept."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


def warn_of_coarse_training(parameters: Mapping[str, Tensor]) -> None:
    """Warns of ``parameters`` to be stepped in their own dtype where that is too coarse for small steps."""
    coarse = {name: parameter for name, parameter in parameters.items() if is_coarse(parameter.dtype)}
    if not coarse:
        return
    name, parameter = next(iter(coarse.items()))
    count = sum(parameter.numel() for parameter in coarse.values())
    dtype = str(parameter.dtype).removeprefix("torch.")
    warnings.warn(
        f"{len(coarse)} whole tensors with {count:,} parameters, such as {name!r}, are trained in {dtype}: a step "
        f"below {torch.finfo(parameter.dtype).eps / 2:.2g} of a weight is rounded away, unless the optimizer keeps "
        f"copies in float32, as DeepSpeed's do. Load the model in float32 to keep such steps, or train rows or "
        f"elements, which are float32 over any base.",
        RoundingWarning,
        stacklevel=3,
    )
