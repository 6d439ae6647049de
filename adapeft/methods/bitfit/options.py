"""The options of ``bitfit``."""

from __future__ import annotations

from typing import Literal

from adapeft.sections.select import Select


class BitFitOptions(Select):
    granularities = ("tensor",)

    method: Literal["bitfit"]
