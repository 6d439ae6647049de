"""The config's ``data`` section: what every task reads; each task adds its own keys."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from adapeft.sections.paths import DATA_SUFFIXES
from adapeft.sections.section import Harmless, Section

_NONE: Mapping[str, Any] = MappingProxyType({})


class Data(Section):
    """Examples to train on and to be judged by."""

    task: ClassVar[str]
    """Name of the task that reads these keys."""
    formerly: ClassVar[Mapping[str, Any]] = _NONE
    """Keys that the task once took and never read, with the value that older versions wrote for them."""
    if TYPE_CHECKING:  # every task has these keys, each with a description and choices of its own
        max_length: int
        metric: str

    train: str = Field(
        description=f"file ({', '.join(DATA_SUFFIXES)}) or hub data set: name, name@split or name:config@split",
        min_length=1,
    )
    evaluation: Harmless[str] = Field(
        description="held-out examples, spelled like train; glue:cola@validation", min_length=1
    )
    text: str = Field(default="text", description="column of the text")

    @property
    def text_columns(self) -> dict[str, str]:
        """Column of each key that names one of texts."""
        return {"text": self.text}

    @property
    def label_columns(self) -> dict[str, tuple[str, ...]]:
        """Columns of each key that names some of labels."""
        return {}
