"""``validation.json``: the trials of ``adapeft validate`` and their result, validated before it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PositiveInt, model_validator

from adapeft.config.experiments import Trials
from adapeft.config.keys import differing
from adapeft.errors import AdapeftError
from adapeft.files.artifact import provenance, save_json
from adapeft.files.damage import Header, Line, load_json, reading
from adapeft.files.json_numbers import decoded, undefined_as_null

_REMEDY = "Remove it, and the same command writes it again."


class _Setting(Header):
    learning_rate: float
    steps: PositiveInt
    planned_constant: float
    fitted_constant: float
    overshooting: float
    diverged: float = 0.0
    correlations: dict[Line, dict[Line, float | None]] = Field(min_length=1)
    at_fitted_reach: dict[Line, float | None]
    decreases: list[float] = []
    predictions: dict[Line, list[float]] = {}


class _Draw(Header):
    size: float


class _Validation(Header):
    """Content of the file. Earlier versions kept no predictions."""

    settings: list[_Setting] = Field(min_length=1)
    granularity: Line = ""
    draws: list[_Draw] = []

    @model_validator(mode="after")
    def _is_of_all_draws(self) -> Self:
        for setting in self.settings:
            if any(len(values) != len(self.draws) for values in (setting.decreases, *setting.predictions.values())):
                raise ValueError("a setting is without the outcome of a draw")
        return self


def save_validation(path: Path, result: Mapping[str, Any], trials: Trials) -> None:
    """Write the file; NaN (no correlation) becomes null."""
    content = {**result, "trials": trials.model_dump(mode="json"), "provenance": provenance()}
    save_json(path, undefined_as_null(content))


def load_validation(path: Path, trials: Trials) -> dict[str, Any]:
    """Return the result of these ``trials``.

    Raises:
        AdapeftError: the file is damaged, or holds other trials.
    """
    content = decoded(load_json(path, "a result of adapeft validate", _REMEDY))
    with reading(f"{path} is damaged", _REMEDY):
        _Validation.model_validate(content)
        before = Trials.model_validate(content["trials"])
    other = differing(trials.model_dump(mode="json"), before.model_dump(mode="json"))
    if other:
        raise AdapeftError(
            f"{path} holds the results of other trials:\n  " + "\n  ".join(other) + "\nGive another folder: output=…"
        )
    return content
