"""The options of ``mixout`` and ``mixout-reset``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adapeft.methods.base.options import RuleOptions
from adapeft.sections.section import Harmless


class _Probability(RuleOptions):
    """In Lee et al. 2020, p = 0.9 performed best on the small GLUE tasks."""

    probability: Harmless[float] = Field(
        default=0.9, ge=0, lt=1, description="probability that a weight is replaced by its pretrained value"
    )


class MixoutOptions(_Probability):
    """Options of ``select.method: mixout``."""

    method: Literal["mixout"]


class MixoutResetOptions(_Probability):
    """Options of ``select.method: mixout-reset``."""

    method: Literal["mixout-reset"]
