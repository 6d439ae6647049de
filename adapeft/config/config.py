"""The whole config of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, NonNegativeInt, model_validator

from adapeft.config.data import AnyData
from adapeft.errors import AdapeftError
from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.methods.options import AnyOptions
from adapeft.model.section import Model
from adapeft.sections.cluster import Cluster
from adapeft.sections.paths import PLACES, absolute, impossible
from adapeft.sections.section import Harmless, Section
from adapeft.sections.train import Train


class Config(Section):
    """Everything that a run depends on."""

    model: Model
    data: AnyData
    output: Harmless[str] = Field(
        description="folder or URL (s3://…) to which the run writes all its files", min_length=1
    )
    select: AnyOptions = AdaPEFTOptions()
    train: Train = Train()
    cluster: Cluster = Cluster()
    seed: NonNegativeInt = Field(default=0, description="random seed", lt=2**32)

    @model_validator(mode="after")
    def _attention_can_train(self) -> Config:
        attention = self.model.attn_implementation
        if attention in (None, "eager", "sdpa"):
            return self
        given = f"model.attn_implementation = {attention}"
        if not self.cluster.gpus_per_worker:
            raise ValueError(f"{given}: it trains only on GPUs; set cluster.gpus_per_worker: 1, or use eager or sdpa")
        if attention != "flex_attention" and self.model.dtype == "float32":
            raise ValueError(f"{given}: does not support float32; set model.dtype: bfloat16, or use eager or sdpa")
        return self

    @model_validator(mode="after")
    def _attention_can_pack(self) -> Config:
        attention = self.model.attn_implementation
        if self.data.packed_length is not None and attention not in (None, "eager", "sdpa", "flex_attention"):
            raise ValueError(
                f"model.attn_implementation = {attention}: in a batch of several rows it does not separate the "
                "examples of a row; set data.packing: false, or use sdpa, eager or flex_attention"
            )
        return self

    @model_validator(mode="after")
    def _choice_can_be_servable(self) -> Config:
        if self.select.servable and self.train.subset is not None:
            raise ValueError(
                f"select.servable = true: restricts what is chosen, but train.subset = {self.train.subset} is chosen "
                "already; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _streams(self) -> Config:
        if not self.data.is_streamed:
            return self
        if self.train.max_steps is None:
            raise ValueError(
                "train.max_steps = null: with data.streaming the number of examples, and so of an epoch's steps, is "
                "unknown; set train.max_steps, the number of optimizer steps"
            )
        if self.train.learning_rate == "auto":
            raise ValueError(
                "train.learning_rate = auto: short trainings hold out a part of the training data, and data.streaming "
                "divides none; set a number"
            )
        if self.train.train_sampling_strategy != "random":
            raise ValueError(
                f"train.train_sampling_strategy = {self.train.train_sampling_strategy}: with data.streaming the "
                "lengths of the examples are unknown; set random"
            )
        return self

    def paths(self) -> dict[str, str]:
        """Return the paths in the config as they are spelled, ``{"data.train": "train.jsonl", "output": "runs/mine"}``.

        Names on a hub and URLs are no paths.
        """
        given = {key: self._at(key) for key in PLACES}
        return {key: place for key, place in given.items() if place is not None and PLACES[key](place)}

    def with_paths(self, paths: Mapping[str, str]) -> Config:
        """Return a copy with these paths, by dotted key."""
        tree = self.model_dump()
        for key, path in paths.items():
            section, _, name = key.rpartition(".")
            (tree[section] if section else tree)[name] = path
        return Config.model_validate(tree)

    def resolved(self) -> Config:
        """Return a copy with absolute paths, because workers run in other folders. Names on a hub stay as they are.

        Raises:
            AdapeftError: a path is invalid on this file system, such as one that is too long. Names it.
        """
        paths = {key: absolute(path) for key, path in self.paths().items()}
        for key, path in paths.items():
            if (reason := impossible(path)) is not None:
                raise AdapeftError(f"{key} = {path}: is not a valid path ({reason}). Give another one.")
        return self.with_paths(paths)

    def _at(self, key: str) -> Any:
        section, _, name = key.rpartition(".")
        return getattr(getattr(self, section) if section else self, name)
