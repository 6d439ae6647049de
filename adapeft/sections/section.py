"""What every section of a config has in common, and the values that several of them hold."""

from __future__ import annotations

from typing import Annotated, Literal

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

from adapeft.files.json_numbers import infinity_in_words
from adapeft.sections.budget import Budget


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
