"""The options of ``sam``."""

from __future__ import annotations

from typing import Literal

from adapeft.methods.base.options import ValuedOptions


class SAMOptions(ValuedOptions):
    method: Literal["sam"]
