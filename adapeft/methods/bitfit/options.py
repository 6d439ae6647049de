"""The options of ``bitfit``."""

from __future__ import annotations

from typing import Literal

from adapeft.sections.select import OnQuantized, Select


class BitFitOptions(Select):
    granularities = ("tensor",)

    method: Literal["bitfit"]

    @property
    def quantized_matrices(self) -> OnQuantized:
        return "left out"
