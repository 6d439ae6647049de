"""``metrics.json`` of a run, validated before anything is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import FiniteFloat, PositiveInt, model_validator

from adapeft.files.damage import Count, Header, Line, load_json, reading
from adapeft.files.json_numbers import decoded

_PEAKS = {"measuring": "measuring_peak_memory_bytes", "training": "peak_memory_bytes"}


class StageMemory(NamedTuple):
    """Memory of a worker in a stage.

    Attributes:
        peak: largest measured bytes of a worker.
        parts: bytes as estimated before the run, by part; empty if they were not.
        is_bound: whether the estimated activations are an upper bound.
    """

    peak: int
    parts: Mapping[str, int]
    is_bound: bool


class _Estimated(Header):
    parts: dict[Line, Count]
    is_bound: bool


class _Choice(Header):
    value: FiniteFloat | None = None
    joint_value: FiniteFloat | None = None
    bound: FiniteFloat | None = None
    gap: FiniteFloat | None = None
    status: Line | None = None
    num_groups: Count | None = None
    num_chosen: Count | None = None
    memory_per_device: Count | None = None
    memory_bytes: Count | None = None
    unspent: Count | None = None
    num_drawn: Count | None = None


class _Metrics(Header):
    """Content of the file of a run that has chosen."""

    choice: _Choice = _Choice()
    seconds: dict[Line, float] = {}
    estimated_memory: dict[Line, _Estimated] = {}


class _Trained(_Metrics):
    """Content of the file of a run that has trained."""

    choice: _Choice
    seconds: dict[Line, float]
    metric: Line
    before: dict[Line, float]
    after: dict[Line, float]
    last: dict[Line, float]
    history: list[dict[str, Any]]
    total_parameters: PositiveInt
    trainable_parameters: Count
    always_trained_parameters: Count
    delta_bytes: PositiveInt
    peak_memory_bytes: Count

    @model_validator(mode="after")
    def _is_scored(self) -> Self:
        for scores in (self.before, self.after, self.last, *self.history):
            if not all(isinstance(scores.get(name), float | int) for name in (self.metric, "loss")):
                raise ValueError(f"a score is without {self.metric} or loss")
        if not all(isinstance(scores.get("step"), int) for scores in self.history):
            raise ValueError("an evaluation is without its step")
        return self


def load_metrics(path: Path) -> dict[str, Any]:
    """Return the content of ``metrics.json``, infinities as numbers; empty if there is no file.

    Raises:
        AdapeftError: the file is damaged.
    """
    if not path.is_file():
        return {}
    content = decoded(load_json(path, "a run's metrics file", "Remove it, and run again."))
    with reading(f"{path}: damaged", "Remove it, and run again."):
        (_Trained if "after" in content else _Metrics).model_validate(content)
    return content


def estimated_of(stages: Mapping[str, StageMemory]) -> tuple[dict[str, StageMemory], list[str]]:
    """Return the stages that were estimated, and the parts of which any of them has some."""
    estimated = {stage: held for stage, held in stages.items() if held.parts}
    parts = dict.fromkeys(part for held in estimated.values() for part in held.parts)
    return estimated, [part for part in parts if any(held.parts[part] for held in estimated.values())]


def memory_of(metrics: Mapping[str, Any]) -> dict[str, StageMemory]:
    """Return the memory of each stage whose peak is known.

    Args:
        metrics: content of ``metrics.json``.
    """
    estimated = metrics.get("estimated_memory", {})
    unknown = {"parts": {}, "is_bound": False}
    return {
        stage: StageMemory(metrics[key], **estimated.get(stage, unknown))
        for stage, key in _PEAKS.items()
        if key in metrics
    }
