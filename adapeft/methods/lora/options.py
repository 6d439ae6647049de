"""The options of ``lora``."""

from __future__ import annotations

from typing import Literal

from adapeft.sections.select import Select


class LoRAOptions(Select):
    """Options of ``select.method: lora``, which adds none of its own."""

    granularities = ("tensor",)

    method: Literal["lora"]
