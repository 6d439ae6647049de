"""The options of ``adapter``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adapeft.sections.section import Harmless
from adapeft.sections.select import OnQuantized, Select


class AdapterOptions(Select):
    """Options of ``select.method: adapter``."""

    granularities = ("tensor",)

    method: Literal["adapter"]
    placement: Harmless[Literal["pfeiffer", "houlsby"]] = Field(
        default="pfeiffer", description="position of adapters: after feed-forward layers; houlsby: after attention too"
    )

    @property
    def quantized_matrices(self) -> OnQuantized:
        return "candidate"
