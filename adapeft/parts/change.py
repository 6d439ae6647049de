"""What training has changed of one parameter, and how it goes into the parameter's values and out again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapeft.finite import check_finite
from adapeft.model.rounding import Rounding
from adapeft.parts.lora import low_rank_sum
from adapeft.parts.part import Part

_TOO_LARGE = (
    "The delta's values are too large: merge in float32 (--dtype float32), scale the delta by less, or train it again "
    "at a lower learning rate."
)


@dataclass(frozen=True)
class Change:
    """The difference on one parameter: ``values`` float32, shaped like the leaf of ``part``, or like a whole tensor.

    Of a part that adds to the model they are its pieces, one after another: [count].
    """

    part: Part
    values: Tensor

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
        values = self.values.to(device, torch.float32)
        if self.part.kind == "lora":
            return low_rank_sum(self.part, values)
        return values.movedim(0, self.part.dim) if self.part.kind == "rows" else values

    def to(self, device: torch.device) -> Change:
        """The same change with its tensors on ``device``."""
        indices = None if self.part.indices is None else self.part.indices.to(device)
        return Change(replace(self.part, indices=indices), self.values.to(device))

    def touched(self, parameter: Tensor) -> Tensor:
        """A copy of the entries of ``parameter`` that ``add_to`` changes."""
        if self.part.indices is None:
            return parameter.detach().clone()
        place = self.part.indices.to(parameter.device)
        if self.part.kind == "elements":
            return parameter.detach()[torch.unravel_index(place, parameter.shape)]
        return parameter.detach().index_select(self.part.dim, place)

    def put_back(self, parameter: Tensor, entries: Tensor) -> None:
        """Writes what ``touched`` returned, bit for bit."""
        if self.part.indices is None:
            parameter.copy_(entries)
            return
        place = self.part.indices.to(parameter.device)
        if self.part.kind == "elements":  # in the parameter's own order, however its memory is laid out
            parameter[torch.unravel_index(place, parameter.shape)] = entries
        else:
            parameter.index_copy_(self.part.dim, place, entries)
