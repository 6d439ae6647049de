"""What training has changed of one parameter, and how it goes into the parameter's values and out again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from adapeft.finite import check_finite
from adapeft.model.rounding import Rounding
from adapeft.parts.part import Part

_TOO_LARGE = (
    "The delta's values are too large: merge in float32 (--dtype float32), scale the delta by less, or train it again "
    "at a lower learning rate."
)


PartT = TypeVar("PartT", bound=Part, covariant=True)


@dataclass(frozen=True)
class Change(Generic[PartT]):
    """The difference on one parameter: ``values`` float32 [``part.value_shape``]."""

    part: PartT
    values: Tensor

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The values as a file holds them, by name."""
        return self.part.split(self.values)

    @property
    def has_moved(self) -> bool:
        """Whether it changes anything: whether the pieces that start at zero have left it."""
        return any(bool(self.tensors[piece].any()) for piece in self.part.scaling_pieces)

    def scaled(self, weight: float) -> Change[PartT]:
        """The change that adds ``weight`` times as much."""
        scaling = self.part.scaling_pieces
        values = [times(value, weight) if piece in scaling else value for piece, value in self.tensors.items()]
        return Change(self.part, self.part.joined(values))

    def add_to(self, name: str, parameter: Tensor, touched: Tensor | None = None) -> Rounding:
        """Adds the difference in place, in float32, rounded once to the parameter's dtype.

        Args:
            name: of the parameter, for messages.
            parameter: of the base.
            touched: what the method of that name has returned, where it is at hand: then it is not read again.

        Returns:
            What was lost in that rounding.

        Raises:
            AdapeftError: the sum is not finite; the parameter is as before.
        """
        difference = self._difference(parameter.device)
        before = self.touched(parameter) if touched is None else touched
        after = (before + difference).to(parameter.dtype)  # torch adds in the wider dtype
        check_finite({name: before}, "the base model", "Its checkpoint is damaged: get it again.")
        check_finite({name: after}, f"base plus delta in {after.dtype}", _TOO_LARGE)
        self.put_back(parameter, after)
        return Rounding.between(before, after, difference)

    def rounding(self, before: Tensor, after: Tensor) -> Rounding:
        """What was lost where this change made the parameter ``after`` of ``before``."""
        return Rounding.between(self.touched(before), self.touched(after), self._difference(before.device))

    def _difference(self, device: torch.device) -> Tensor:
        """float32, in the shape of ``touched``."""
        return self.part.difference(self.values.to(device, torch.float32))

    def to(self, device: torch.device) -> Change[PartT]:
        """The same change with its tensors on ``device``."""
        return Change(self.part.to(device), self.values.to(device))

    def touched(self, parameter: Tensor) -> Tensor:
        """A copy of the entries of ``parameter`` that ``add_to`` changes."""
        return self.part.touched(parameter)

    def put_back(self, parameter: Tensor, entries: Tensor) -> None:
        """Writes what ``touched`` returned, bit for bit."""
        self.part.put_back(parameter, entries)


def times(values: Tensor, weight: float) -> Tensor:
    """float32 ``values`` times ``weight``, rounded once."""
    return (values.double() * weight).float()
