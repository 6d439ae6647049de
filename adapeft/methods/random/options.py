"""The options of ``random``."""

from __future__ import annotations

from typing import Literal

from adapeft.sections.select import OnQuantized, Select


class RandomOptions(Select):
    method: Literal["random"]

    @property
    def quantized_matrices(self) -> OnQuantized:
        return "candidate" if self.granularity in ("row", "element") else "refused"
