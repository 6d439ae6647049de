"""The options of ``random``."""

from __future__ import annotations

from typing import Literal

from adapeft.sections.select import Select


class RandomOptions(Select):
    method: Literal["random"]
