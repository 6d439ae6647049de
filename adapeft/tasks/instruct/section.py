"""The ``data`` section of instruction tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PositiveInt,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from adapeft.sections.data import AnsweredData, Generated, Invalid, NewTokens, Padding, StreamableData
from adapeft.sections.section import Harmless
from adapeft.tasks.instruct.formats import FORMATS

Renamed = Annotated[
    tuple[tuple[str, str], ...],
    BeforeValidator(lambda given: tuple(given.items()) if isinstance(given, Mapping) else given),
    PlainSerializer(dict, return_type=dict[str, str]),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]
"""A mapping that can be hashed, as sections are."""


class InstructData(AnsweredData, StreamableData):
    """Conversations to train and evaluate on."""

    task: ClassVar[str] = "instruct"

    format: Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt"] = Field(
        default="auto", description="format of the rows; auto: recognized by its columns"
    )
    columns: Renamed = Field(default=(), description="column of the format: column of the data, where they differ")
    chat_template: str | None = Field(
        default=None, description="file.jinja, or the template itself; null: the tokenizer's own"
    )
    train_on: Literal["completion", "assistant", "all"] = Field(
        default="assistant",
        description="tokens that are trained: the last answer, all of the assistant's, or all tokens",
    )
    max_length: PositiveInt = Field(default=1024, description="maximum tokens per example")
    padding: Padding = "longest"
    packing: Harmless[bool] = Field(
        default=False,
        description="whether the examples of a micro-batch share rows of max_length tokens instead of being padded; "
        "none attends to another, and the results are the same",
    )
    too_long: Literal["truncate", "drop", "error"] = Field(
        default="truncate",
        description="what happens to longer examples; those left without a trained token are dropped",
    )
    invalid: Invalid = Field(
        default="error",
        description="what happens to rows that are not a valid conversation, that the template rejects, or of which no "
        "token is trained",
    )
    generate: Harmless[Generated] = 0
    max_new_tokens: Harmless[NewTokens] = 128
    metric: Harmless[Literal["auto", "loss", "perplexity", "exact_match", "rouge_l", "bleu"]] = Field(
        default="auto", description="evaluation metric; the last three need data.generate"
    )

    @property
    def packed_length(self) -> int | None:
        """See ``Data.packed_length``."""
        return self.max_length if self.packing else None

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """See ``StreamableData.optional_columns``; those of ``columns`` have to exist."""
        names = {name: None for one in FORMATS.values() for name in one.optional}
        return tuple(name for name in names if name not in dict(self.columns))

    @model_validator(mode="after")
    def _pads_or_packs(self) -> Self:
        if self.packing and self.padding == "max_length":
            raise ValueError(
                "packing: models whose predictions depend on the padding (padding: max_length) cannot be packed; leave "
                "out one of the two"
            )
        return self

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, given: str | None) -> str | None:
        """Replace a file by what it holds, so that the config of a run says how its data was written."""
        if given is None or not given.endswith(".jinja"):
            return given
        path = Path(given).expanduser()
        if not path.is_file():
            raise ValueError(f"{given}: no such file")
        return path.read_text(encoding="utf-8")
