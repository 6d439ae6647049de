"""The base class of all config sections, and the types of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
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
"""The type of a key that measuring does not depend on: saved statistics stay valid when it changes."""


def is_harmless(field: FieldInfo) -> bool:
    """Return whether saved statistics stay valid when the field changes."""
    return _Mark.HARMLESS in field.metadata


@dataclass(frozen=True)
class PartOf:
    """Mark of a field that is used only together with another key."""

    key: str


def together(fields: Mapping[str, FieldInfo]) -> list[list[str]]:
    """Group the keys of ``fields``: each ``PartOf`` in one list with its key, all others alone."""
    lists: dict[str, list[str]] = {}
    for name, field in fields.items():
        whole = next((mark.key for mark in field.metadata if isinstance(mark, PartOf)), name)
        lists.setdefault(whole, []).append(name)
    return list(lists.values())


class Section(BaseModel):
    """Base class of config sections: immutable, unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HashableDict(dict[str, Any]):
    """A dictionary of hashable values in a config, all of which can be hashed; nothing changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Options = Annotated[dict[str, str | int | float | bool | None], AfterValidator(HashableDict)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(as_list)]
Reach = Annotated[Literal["auto"] | PositiveFloat, PlainSerializer(infinity_in_words)]
Limit = Annotated[
    Budget,
    PlainValidator(Budget.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}),
]

# Adam divides the step by 1 - β₁, which overflows float32 above 3e37 and makes a worker fail. Below, training diverges.
LearningRate = Annotated[float, Field(gt=0, le=1e37, allow_inf_nan=False)]

Bytes = Annotated[
    ByteSize,
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer", "exclusiveMinimum": 0}]}),
]


def plain(value: object) -> object:
    """Return ``value`` as a type that YAML can represent."""
    return str(value) if isinstance(value, Budget) else list(value) if isinstance(value, tuple) else value
