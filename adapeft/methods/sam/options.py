"""The options of ``sam``."""

from __future__ import annotations

from typing import Literal

from adapeft.methods.base.options import ValuedOptions


class SAMOptions(ValuedOptions):
    """Options of ``select.method: sam``, which adds none of its own."""

    method: Literal["sam"]
