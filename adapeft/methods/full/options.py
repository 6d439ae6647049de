"""The options of ``full``."""

from __future__ import annotations

from typing import Literal

from adapeft.sections.select import Select


class FullOptions(Select):
    granularities = ("tensor",)

    method: Literal["full"]
