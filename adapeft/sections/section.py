"""What every section of a config has in common, and the values that several of them hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PositiveFloat,
    WithJsonSchema,
)
from pydantic.fields import FieldInfo

from adapeft.files.json_numbers import infinity_in_words
from adapeft.sections.budget import Budget

_T = TypeVar("_T")


class _Mark(Enum):
    HARMLESS = "harmless"


Harmless = Annotated[_T, _Mark.HARMLESS]
"""The type of a key that nothing measured depends on: saved statistics serve a config with another value."""


def is_harmless(field: FieldInfo) -> bool:
    """Whether saved statistics serve a config with another value of the field."""
    return _Mark.HARMLESS in field.metadata


@dataclass(frozen=True)
class PartOf:
    """Marks a key that means nothing without another one."""

    key: str


def together(fields: Mapping[str, FieldInfo]) -> list[list[str]]:
    """The keys, those that mean nothing without another one in one list with it."""
    lists: dict[str, list[str]] = {}
    for name, field in fields.items():
        whole = next((mark.key for mark in field.metadata if isinstance(mark, PartOf)), name)
        lists.setdefault(whole, []).append(name)
    return list(lists.values())


class Section(BaseModel):
    """Part of a config: read-only, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Reach = Annotated[Literal["auto"] | PositiveFloat, PlainSerializer(infinity_in_words)]
Limit = Annotated[
    Budget,
    PlainValidator(Budget.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}),
]

# A step of Adam divides by 1 - β₁: above 3e37 that overflows float32, and a worker fails. Below, training diverges.
LearningRate = Annotated[float, Field(gt=0, le=1e37, allow_inf_nan=False)]

Bytes = Annotated[
    ByteSize,
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer", "exclusiveMinimum": 0}]}),
]


def plain(value: object) -> object:
    """``value`` as YAML can hold it."""
    return str(value) if isinstance(value, Budget) else list(value) if isinstance(value, tuple) else value
