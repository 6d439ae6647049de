"""The whole config: everything that a run depends on."""

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
        description="folder or URL (s3://…) of the run: all that it makes goes there", min_length=1
    )
    select: AnyOptions = AdaPEFTOptions()
    train: Train = Train()
    cluster: Cluster = Cluster()
    seed: NonNegativeInt = Field(default=0, description="of everything random", lt=2**32)

    @model_validator(mode="after")
    def _attention_can_train(self) -> Config:
        attention = self.model.attn_implementation
        if attention in (None, "eager", "sdpa"):
            return self
        given = f"model.attn_implementation = {attention}"
        if not self.cluster.gpus_per_worker:
            raise ValueError(f"{given}: it trains on GPUs alone; set cluster.gpus_per_worker: 1, or take eager or sdpa")
        if attention != "flex_attention" and self.model.dtype == "float32":
            raise ValueError(f"{given}: its kernels take no float32; set model.dtype: bfloat16, or take eager or sdpa")
        return self

    def paths(self) -> dict[str, str]:
        """What lies on a file system, as it is spelled: ``{"data.train": "train.jsonl", "output": "runs/mine", …}``."""
        given = {key: self._at(key) for key in PLACES}
        return {key: place for key, place in given.items() if place is not None and PLACES[key](place)}

    def with_paths(self, paths: Mapping[str, str]) -> Config:
        """The same with other places, by dotted key."""
        tree = self.model_dump()
        for key, path in paths.items():
            section, _, name = key.rpartition(".")
            (tree[section] if section else tree)[name] = path
        return Config.model_validate(tree)

    def resolved(self) -> Config:
        """The same with absolute paths, because workers run in other folders. Names on a hub stay as they are.

        Raises:
            AdapeftError: names a path that no file system takes, such as one that is too long.
        """
        paths = {key: absolute(path) for key, path in self.paths().items()}
        for key, path in paths.items():
            if (reason := impossible(path)) is not None:
                raise AdapeftError(f"{key} = {path}: is not a possible path ({reason}). Give another one.")
        return self.with_paths(paths)

    def _at(self, key: str) -> Any:
        section, _, name = key.rpartition(".")
        return getattr(getattr(self, section) if section else self, name)
