"""The options of ``snip``."""

from __future__ import annotations

from typing import Literal

from adapeft.methods.base.options import ValuedOptions


class SNIPOptions(ValuedOptions):
    method: Literal["snip"]
