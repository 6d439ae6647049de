"""The header of a delta's file: the keys of its description that the code uses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat

from adapeft.files.damage import Header, Line
from adapeft.files.json_numbers import Number
from adapeft.tasks.registry import TaskName

_MOST_LABELS = 2**20
"""Limit on labels, because transformers builds a dictionary with one name per label."""


class Labels(Header):
    """Only the keys of ``label_options``: transformers takes any other key, such as trust_remote_code, as an option."""

    model_config = ConfigDict(extra="forbid")

    num_labels: Annotated[int, Field(ge=1, le=_MOST_LABELS)] | None = None
    id2label: dict[str, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None


class BaseModelHeader(Header):
    name: Line | None = None
    architecture: Line | None = None
    task: TaskName | None = None
    labels: Labels = Labels()
    quantization: Line | None = None


class SourceHeader(Header):
    name: Line
    weight: FiniteFloat


class DeltaHeader(Header):
    """Keys of the description that the code uses. Others are free."""

    parts: dict[Line, dict[str, Any]]
    new: list[Line]
    buffers: list[Line] = []
    fingerprint: Line
    method: Line | None = None
    scores: dict[Line, Number] = {}
    model: BaseModelHeader | None = None
    sources: list[SourceHeader] = []
