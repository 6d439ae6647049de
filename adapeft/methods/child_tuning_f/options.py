"""The options of ``child-tuning-f``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adapeft.methods.base.options import RuleOptions
from adapeft.sections.section import Harmless


class ChildTuningFOptions(RuleOptions):
    """Xu et al. 2021 searched the probability in {0.2, 0.3, 0.4}."""

    method: Literal["child-tuning-f"]
    probability: Harmless[float] = Field(
        default=0.3, gt=0, le=1, description="probability that a gradient is kept in a step"
    )
