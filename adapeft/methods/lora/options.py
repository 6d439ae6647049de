"""The options of ``lora``."""

from __future__ import annotations

from typing import Literal

from adapeft.sections.select import OnQuantized, Select


class LoRAOptions(Select):
    granularities = ("tensor",)

    method: Literal["lora"]

    @property
    def unservable(self) -> None:
        return None

    @property
    def quantized_matrices(self) -> OnQuantized:
        return "candidate"
