"""The options of ``fish``."""

from __future__ import annotations

from typing import Literal

from adapeft.methods.base.options import ValuedOptions


class FishOptions(ValuedOptions):
    method: Literal["fish"]
