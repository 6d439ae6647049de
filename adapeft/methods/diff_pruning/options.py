"""The options of ``diff-pruning``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from adapeft.methods.base.options import RuleOptions
from adapeft.sections.section import Harmless


class DiffPruningOptions(RuleOptions):
    """Defaults follow Guo et al. 2021 and their code, in which all gates start open, at 5."""

    method: Literal["diff-pruning"]
    penalty: Harmless[float] = Field(
        default=1.25e-7, ge=0, allow_inf_nan=False, description="weight of the expected number of open gates"
    )
    gate_learning_rate: Harmless[PositiveFloat] = Field(
        default=0.1, allow_inf_nan=False, description="AdamW learning rate of the gates"
    )
    gate_start: Harmless[float] = Field(default=5.0, ge=-10, le=10, description="logit of every gate before training")
    projection_step: Harmless[float] = Field(
        default=0.5, gt=0, le=1, description="fraction of the steps before the projection"
    )
    structured: Harmless[bool] = Field(default=True, description="add a second gate per tensor")
