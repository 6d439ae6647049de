"""The options of ``child-pruning``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from adapeft.methods.base.options import RuleOptions
from adapeft.sections.section import Harmless


class ChildPruningOptions(RuleOptions):
    """Fu et al. 2023 specify the interval between projections only as every few steps."""

    method: Literal["child-pruning"]
    projection_interval: Harmless[PositiveInt] = Field(default=10, description="steps between projections")
