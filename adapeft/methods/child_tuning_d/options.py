"""The options of ``child-tuning-d``."""

from __future__ import annotations

from typing import Literal

from adapeft.methods.base.options import ValuedOptions


class ChildTuningDOptions(ValuedOptions):
    method: Literal["child-tuning-d"]
