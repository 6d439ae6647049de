"""The numbers that rules take, by method. Imported by the config, so without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from adapeft.errors import AdapeftError, did_you_mean


class RuleOptions(BaseModel):
    """Keys of ``select.rule`` under one method."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MixoutOptions(RuleOptions):
    """Lee et al. 2020: p = 0.9 did best on the small GLUE tasks."""

    probability: float = Field(default=0.9, ge=0, lt=1, description="with which a weight is the pretrained one")


class ChildTuningOptions(RuleOptions):
    """Xu et al. 2021: searched in {0.2, 0.3, 0.4}."""

    probability: float = Field(default=0.3, gt=0, le=1, description="with which a gradient is kept in a step")


class ChildPruningOptions(RuleOptions):
    """Fu et al. 2023 say no more than every few steps."""

    projection_interval: PositiveInt = Field(default=10, description="steps between projections")


class DiffPruningOptions(RuleOptions):
    """Guo et al. 2021 and their code, whose gates start at 5, all of them open."""

    penalty: float = Field(default=1.25e-7, ge=0, allow_inf_nan=False, description="weight of the expected open gates")
    gate_learning_rate: PositiveFloat = Field(default=0.1, allow_inf_nan=False, description="AdamW's, for the gates")
    gate_start: float = Field(default=5.0, ge=-10, le=10, description="logit of every gate before training")
    projection_step: float = Field(default=0.5, gt=0, le=1, description="part of the steps before the projection")
    structured: bool = Field(default=True, description="a second gate for each tensor")


OPTIONS: dict[str, type[RuleOptions]] = {
    "mixout": MixoutOptions,
    "mixout-reset": MixoutOptions,
    "child-tuning-f": ChildTuningOptions,
    "child-pruning": ChildPruningOptions,
    "diff-pruning": DiffPruningOptions,
}
"""Methods that are rules; no other method has keys in ``select.rule``."""


def parse_options(method: str, given: Mapping[str, Any]) -> RuleOptions:
    """The options of ``method``, its defaults where ``given`` is silent.

    Raises:
        AdapeftError: the method has no rule, no such key, or the value does not do.
    """
    if method not in OPTIONS:
        raise AdapeftError(
            f"select.rule: {method} has no rule. Leave select.rule out, or choose one of the methods "
            f"{', '.join(OPTIONS)}."
        )
    options = OPTIONS[method]
    known = ", ".join(options.model_fields)
    for key in given:
        if key not in options.model_fields:
            hint = did_you_mean(str(key), options.model_fields)
            raise AdapeftError(f"select.rule: {method} has no {key!r}.{hint} There is {known}.")
    try:
        return options.model_validate(given)
    except ValidationError as error:
        detail = error.errors()[0]
        key = str(detail["loc"][0])
        wanted = detail["msg"].removeprefix("Input should be ")
        raise AdapeftError(
            f"select.rule: {key} = {given[key]} should be {wanted} ({options.model_fields[key].description})."
        ) from None
