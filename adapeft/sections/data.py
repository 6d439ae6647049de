"""The keys of the config's ``data`` section that all tasks have; each task adds its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from adapeft.sections.paths import DATA_SUFFIXES
from adapeft.sections.section import Harmless, Section

_NONE: Mapping[str, Any] = MappingProxyType({})


class Data(Section):
    """Examples to train and evaluate on."""

    task: ClassVar[str]
    """Name of the task that reads these keys."""
    formerly: ClassVar[Mapping[str, Any]] = _NONE
    """Keys that older versions accepted and never read, with the defaults that they wrote."""
    if TYPE_CHECKING:  # every task declares these keys with its own description and choices
        max_length: int
        metric: str

    train: str = Field(
        description=f"file ({', '.join(DATA_SUFFIXES)}) or hub data set: name, name@split or name:config@split",
        min_length=1,
    )
    evaluation: Harmless[str] = Field(
        description="held-out examples, written like train, such as glue:cola@validation", min_length=1
    )

    @property
    def text_columns(self) -> dict[str, str]:
        """Key → the column of texts that it names."""
        return {}

    @property
    def image_columns(self) -> dict[str, str]:
        """Key → the column of images that it names."""
        return {}

    @property
    def label_columns(self) -> dict[str, tuple[str, ...]]:
        """Key → the columns that it names, of labels or of other values that are no texts."""
        return {}

    @property
    def packed_length(self) -> int | None:
        """Maximum number of tokens of a row that examples share; None: one example per row."""
        return None

    @property
    def is_streamed(self) -> bool:
        """Whether the training examples are read and tokenized while they are trained on."""
        return False


class StreamableData(Data):
    """Examples that can be read while they are trained on: no label of theirs has to be known beforehand."""

    streaming: Harmless[bool] = Field(
        default=False,
        description="whether data.train is read and tokenized during the training, for data that fit neither into "
        "memory nor on the disk; needs train.max_steps",
    )
    shuffle_buffer: Harmless[PositiveInt] = Field(
        default=10_000,
        description="with streaming: training examples in memory, from which calibration and batches are drawn; 1: in "
        "the order of the data",
    )
    evaluation_examples: Harmless[PositiveInt | None] = Field(
        default=None, description="with streaming: rows of data.evaluation that are read, the first ones; null: all"
    )

    @property
    def is_streamed(self) -> bool:
        """See ``Data.is_streamed``."""
        return self.streaming

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Columns that only some rows may have, and that are read where they exist."""
        return ()

    @model_validator(mode="after")
    def _streams(self) -> Self:
        for name in ("shuffle_buffer", "evaluation_examples"):
            value, field = getattr(self, name), type(self).model_fields[name]
            if not self.streaming and value != field.default:
                raise ValueError(f"{name} = {value}: is read only with streaming: true; leave it out, or set that")
        return self


Padding = Annotated[
    Literal["longest", "max_length"],
    Field(
        description="length of a batch: that of its longest example; max_length: data.max_length, for models whose "
        "predictions depend on the padding"
    ),
]


Invalid = Literal["error", "drop"]
"""What happens to rows that are no valid examples; every task that has them says which they are."""


class PaddedData(Data):
    """Examples of different lengths, of which a batch pads the shorter ones."""

    if TYPE_CHECKING:  # declared by every task, among its own keys
        padding: Padding

    @property
    def fixed_length(self) -> int | None:
        """Number of tokens of every batch; None: that of its longest example."""
        return self.max_length if self.padding == "max_length" else None


Generated = Annotated[
    Literal["all"] | NonNegativeInt,
    Field(
        description="number of evaluation examples, the first ones, whose answers are generated and compared at every "
        "evaluation; 0: none"
    ),
]
NewTokens = Annotated[PositiveInt, Field(description="maximum tokens of a generated answer")]
_OF_ANSWERS = ("exact_match", "rouge_l", "bleu")


class AnsweredData(PaddedData):
    """Examples with a prompt, of which a model can generate the answer."""

    if TYPE_CHECKING:  # declared by every task, among its own keys
        generate: Literal["all"] | int
        max_new_tokens: int

    @model_validator(mode="after")
    def _is_generated(self) -> Self:
        if self.metric in _OF_ANSWERS and not self.generate:
            raise ValueError(
                f"metric: {self.metric} compares generated answers; set data.generate, the number of examples to answer"
            )
        return self


class TextData(Data):
    """Examples that are texts, one in each row."""

    text: str = Field(default="text", description="column of the text")

    @property
    def text_columns(self) -> dict[str, str]:
        return {"text": self.text}
