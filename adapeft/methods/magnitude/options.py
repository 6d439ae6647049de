"""The options of ``magnitude``."""

from __future__ import annotations

from typing import Literal

from adapeft.methods.base.options import ValuedOptions


class MagnitudeOptions(ValuedOptions):
    """Options of ``select.method: magnitude``, which adds none of its own."""

    method: Literal["magnitude"]
