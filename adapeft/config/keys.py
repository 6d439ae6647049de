"""The keys of a config as dotted paths, and what two configs have in common."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from adapeft.config.config import Config
from adapeft.sections.budget import Budget
from adapeft.sections.cluster import Cluster
from adapeft.sections.data import Data
from adapeft.sections.model import Model
from adapeft.sections.paths import PLACES, without_job_folder
from adapeft.sections.section import Section
from adapeft.sections.select import Select
from adapeft.sections.train import Train

SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "data": Data,
    "select": Select,
    "train": Train,
    "cluster": Cluster,
}


KEYS: dict[str, FieldInfo] = {
    key: field
    for name, top in Config.model_fields.items()
    for key, field in (
        {f"{name}.{word}": field for word, field in SECTIONS[name].model_fields.items()}
        if name in SECTIONS
        else {name: top}
    ).items()
}

# What the statistics of a run depend on: runs that agree on these can share them, whatever their budget,
# reach, training or machines.
_MEASURED = (
    *("model.name", "model.task", "model.revision"),
    *("model.dtype", "model.matmul_precision", "model.attn_implementation"),
    *("data.train", "data.text", "data.text_pair", "data.label", "data.max_length", "data.padding"),
    *(
        "select.method",
        "select.shrinkage",
        "select.joint",
        "select.options",
        "select.lora_ranks",
        "select.groups",
        "select.calibration",
        "select.batch_size",
        "select.direction",
        "select.curvature",
        "select.probe_steps",
        "select.probe_points",
        "select.probe_learning_rate",
        "select.warmup_steps",
    ),
    *("select.always_train", "select.include", "select.exclude"),
    "seed",
)


_READ = ("model.name", "data.train")
"""Those of these keys that name a place, which may come to hold something else."""
_UNREAD: Mapping[str, str] = MappingProxyType({})


def measurement_key(config: Config, contents: Mapping[str, str] = _UNREAD) -> dict[str, Any]:
    """Everything that measuring depends on: equal keys mean that statistics can be used again.

    Args:
        config: of the run.
        contents: hashes of what the places that it names hold; places alone may come to hold something else.
    """
    flat = comparable(config)
    key = {name: flat[name] for name in _MEASURED}
    key.update({content_key(name): contents[name] for name in _READ if name in contents})
    key["select.groups"] = config.select.granularity
    # Single elements are measured alike either way.
    key["select.joint"] = config.select.chooses_jointly and config.select.granularity != "element"
    return key


def content_key(place: str) -> str:
    """Under which a measurement's key has the hash of what a place holds."""
    return f"content of {place}"


def differences(a: Config, b: Config) -> list[str]:
    """Lines such as ``select.budget: 0.5% here, 1% there``, for ``a`` here and ``b`` there."""
    here, there = comparable(a), comparable(b)
    return differing({key: here[key] for key in KEYS}, there)


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """The lines of ``differences`` for any keys; ``there`` has at least those that are ``here``."""
    return [f"{key}: {as_yaml(here[key])} here, {as_yaml(there[key])} there" for key in here if here[key] != there[key]]


def comparable(config: Config) -> dict[str, Any]:
    """By dotted path, with the files of a Ray job as they were spelled: each attempt unpacks them in another folder."""
    flat = flatten(config)
    return {key: without_job_folder(value) if key in PLACES and value else value for key, value in flat.items()}


def flatten(config: Config) -> dict[str, Any]:
    """Plain values by dotted path."""
    tree = config.model_dump(mode="json")
    return {key: tree[key.split(".")[0]][key.split(".")[1]] if "." in key else tree[key] for key in KEYS}


def plain(value: object) -> object:
    """``value`` as YAML can hold it."""
    return str(value) if isinstance(value, Budget) else list(value) if isinstance(value, tuple) else value


def as_yaml(value: object) -> str:
    """``value`` on one line, as a person would write it in a config."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
