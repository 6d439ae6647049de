"""The options of ``magnitude``."""

from __future__ import annotations

from typing import Literal

from adapeft.methods.base.options import ValuedOptions


class MagnitudeOptions(ValuedOptions):
    method: Literal["magnitude"]
