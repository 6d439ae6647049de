"""The trained change of one parameter, and how it is added to the parameter and removed again."""

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
    "The delta's values are too large: merge in float32 (--dtype float32), use a smaller scale, or train again at a "
    "lower learning rate."
)


PartT = TypeVar("PartT", bound=Part, covariant=True)


@dataclass(frozen=True)
class Change(Generic[PartT]):
    """The difference of one parameter to the base: ``values`` float32 [``part.value_shape``]."""

    part: PartT
    values: Tensor

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that store the values in a file, by name."""
        return self.part.split(self.values)

    @property
    def has_moved(self) -> bool:
        """Whether it changes anything: whether a piece that starts at zero is no longer zero."""
        return any(bool(self.tensors[piece].any()) for piece in self.part.scaling_pieces)

    def scaled(self, weight: float) -> Change[PartT]:
        """Return the change multiplied by ``weight``."""
        scaling = self.part.scaling_pieces
        values = [times(value, weight) if piece in scaling else value for piece, value in self.tensors.items()]
        return Change(self.part, self.part.joined(values))

    def add_to(self, name: str, parameter: Tensor, touched: Tensor | None = None) -> Rounding:
        """Add the difference in place, in float32, rounded once to the parameter's dtype.

        Args:
            name: name of the parameter, for messages.
            parameter: parameter of the base.
            touched: result of ``self.touched(parameter)``, if available, to avoid reading it again.

        Returns:
            The entries lost by rounding.

        Raises:
            AdapeftError: the sum is not finite; the parameter is unchanged.
        """
        difference = self._difference(parameter.device)
        before = self.touched(parameter) if touched is None else touched
        after = (before + difference).to(parameter.dtype)  # torch adds in the wider dtype
        check_finite({name: before}, "the base model", "Its checkpoint is damaged: download it again.")
        check_finite({name: after}, f"base plus delta in {after.dtype}", _TOO_LARGE)
        self.put_back(parameter, after)
        return Rounding.between(before, after, difference)

    def rounding(self, before: Tensor, after: Tensor) -> Rounding:
        """Return the entries lost by rounding when this change turned the parameter ``before`` into ``after``."""
        return Rounding.between(self.touched(before), self.touched(after), self._difference(before.device))

    def _difference(self, device: torch.device) -> Tensor:
        """Return the difference in float32, in the shape of ``touched``."""
        return self.part.difference(self.values.to(device, torch.float32))

    def to(self, device: torch.device) -> Change[PartT]:
        return Change(self.part.to(device), self.values.to(device))

    def touched(self, parameter: Tensor) -> Tensor:
        """Return a copy of the entries of ``parameter`` that ``add_to`` changes."""
        return self.part.touched(parameter)

    def put_back(self, parameter: Tensor, entries: Tensor) -> None:
        """Restore the entries that ``touched`` returned, bit for bit."""
        self.part.put_back(parameter, entries)


def times(values: Tensor, weight: float) -> Tensor:
    """Return float32 ``values`` times ``weight``, rounded once."""
    return (values.double() * weight).float()
