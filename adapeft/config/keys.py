"""The keys of a config as dotted paths, and the comparison of configs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from adapeft.config.config import Config
from adapeft.config.data import DATA
from adapeft.methods.options import OPTIONS
from adapeft.model.section import Model
from adapeft.sections.cluster import Cluster
from adapeft.sections.data import Data, StreamableData
from adapeft.sections.paths import PLACES, without_job_folder
from adapeft.sections.section import Section, is_harmless
from adapeft.sections.select import Select
from adapeft.sections.train import Train

SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "data": Data,
    "select": Select,
    "train": Train,
    "cluster": Cluster,
}

VARIANTS: Mapping[str, Mapping[str, type[Section]]] = MappingProxyType({"data": DATA, "select": OPTIONS})
"""Section → its variants, by the value of the dotted key in ``DECIDES``."""
DECIDES: Mapping[str, str] = MappingProxyType({"data": "model.task", "select": "select.method"})


def _fields(section: str) -> dict[str, FieldInfo]:
    """Return the keys of a section: first those of all variants, then those of some."""
    found = dict(SECTIONS[section].model_fields)
    for variant in VARIANTS.get(section, {}).values():
        found = {**variant.model_fields, **found}
    return dict(sorted(found.items(), key=lambda item: item[0] not in SECTIONS[section].model_fields))


KEYS: dict[str, FieldInfo] = {
    key: field
    for name, top in Config.model_fields.items()
    for key, field in (
        {f"{name}.{word}": field for word, field in _fields(name).items()} if name in SECTIONS else {name: top}
    ).items()
}


def field_of(key: str, variant: str | None) -> FieldInfo:
    """Return the field of a dotted key in the given variant of its section."""
    section, _, name = key.partition(".")
    one = VARIANTS.get(section, {}).get(variant or "")
    fields = one.model_fields if one else {}
    return fields[name] if name in fields and name not in SECTIONS[section].model_fields else KEYS[key]


def variants_with(key: str) -> list[str]:
    """Return the variants of its section that have a dotted key; empty if all have it, or none."""
    section, _, name = key.partition(".")
    if section not in VARIANTS or name in SECTIONS[section].model_fields:
        return []
    return [variant for variant, one in VARIANTS[section].items() if name in one.model_fields]


def last_word(key: str) -> str:
    return key.rpartition(".")[2]


def usual(section: str) -> str:
    """Return the default variant of a section."""
    default = Config.model_fields[section].default
    return getattr(default, last_word(DECIDES[section]), next(iter(VARIANTS[section])))


_READ = ("model.name", "data.train")
"""Keys that measuring depends on and that may be paths: the same path may later hold other contents."""
_UNREAD: Mapping[str, str] = MappingProxyType({})


_LEFT_OUT = {
    "select.measure": "exact",
    "select.servable": False,
    "model.quantization": "none",
    "data.streaming": False,
    "data.shuffle_buffer": StreamableData.model_fields["shuffle_buffer"].default,
}
"""Entries that the key of a measurement leaves out if they have these values, as those of older versions do."""


def measurement_key(
    config: Config, contents: Mapping[str, str] = _UNREAD, num_parameters: int = 0, *, is_quantized: bool = False
) -> dict[str, Any]:
    """Return everything that measuring depends on: statistics can be reused if their keys are equal.

    Args:
        config: config of the run.
        contents: dotted key of a path → hash of the contents, which may change while the path stays the same.
        num_parameters: size of the base model.
        is_quantized: whether some of the candidates are quantized.
    """
    flat = comparable(config)
    variants = {section: flat[decides] for section, decides in DECIDES.items()}
    key = {
        name: value
        for name, value in flat.items()
        if not is_harmless(field_of(name, variants.get(name.partition(".")[0])))
    }
    key.update({content_key(name): contents[name] for name in _READ if name in contents})
    if config.model.quantization not in (None, "none"):
        key["model.quantization"] = config.model.quantization
    if config.data.is_streamed:  # the examples that are measured on are drawn in another way
        key |= {name: flat[name] for name in ("data.streaming", "data.shuffle_buffer")}
    measured = config.select.measured(num_parameters, is_quantized=is_quantized)
    return key | {f"select.{name}": value for name, value in measured.items()}


def measured_differently(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Return the lines of ``differences`` between the key of a measurement and that of stored statistics."""
    wanted, stored = {**_LEFT_OUT, **wanted}, {**_LEFT_OUT, **stored}
    return differing(wanted, {key: stored.get(key) for key in wanted})


def content_key(place: str) -> str:
    """Return the entry of a measurement key for the hash of the contents of ``place``, a dotted config key."""
    return f"content of {place}"


def differences(a: Config, b: Config) -> list[str]:
    """Return lines such as ``select.budget: 0.5% here, 1% there``, with ``a`` here and ``b`` there."""
    return differing(comparable(a), comparable(b))


def differing(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Return the lines of ``differences`` for the keys that both have; another method or task has other keys."""
    return [
        f"{key}: {as_yaml(here[key])} here, {as_yaml(there[key])} there"
        for key in here
        if key in there and here[key] != there[key]
    ]


def comparable(config: Config) -> dict[str, Any]:
    """Return ``flatten(config)`` with the original paths of a Ray job, which unpacks files anew for each attempt."""
    flat = flatten(config)
    return {key: without_job_folder(value) if key in PLACES and value else value for key, value in flat.items()}


def flatten(config: Config) -> dict[str, Any]:
    """Return the config's plain values by dotted path."""
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if name in SECTIONS else {name: value}
    return flat


def as_yaml(value: object) -> str:
    """Return ``value`` as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
