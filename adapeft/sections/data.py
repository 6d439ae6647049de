"""The config's ``data`` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from adapeft.sections.paths import DATA_SUFFIXES
from adapeft.sections.section import Harmless, Section

Metric = Literal["auto", "accuracy", "matthews", "f1", "accuracy_f1", "pearson_spearman", "loss", "perplexity"]


class Data(Section):
    """Examples to train on and to be judged by."""

    train: str = Field(
        description=f"file ({', '.join(DATA_SUFFIXES)}) or hub data set: name, name@split or name:config@split",
        min_length=1,
    )
    evaluation: Harmless[str] = Field(
        description="held-out examples, spelled like train; glue:cola@validation", min_length=1
    )
    text: str = Field(default="text", description="column of the text")
    text_pair: str | None = Field(default=None, description="column of the second text, for tasks on pairs")
    label: str = Field(default="label", description="column of the label; not read for causal-lm")
    max_length: PositiveInt = Field(default=128, description="tokens an example is cut to")
    padding: Literal["longest", "max_length"] = Field(
        default="longest",
        description="how long a batch is: its longest example; max_length: as data.max_length, for models whose "
        "predictions depend on the padding",
    )
    metric: Harmless[Metric] = Field(
        default="auto", description="how evaluation judges; auto fits the task and its labels"
    )
