"""Configs as YAML to read and to start from, and the JSON schema for editors."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, get_args, get_origin

from omegaconf import OmegaConf
from pydantic.fields import FieldInfo

from adapeft.config.config import Config
from adapeft.config.keys import DECIDES, KEYS, SECTIONS, VARIANTS, as_yaml, usual
from adapeft.config.problems import listed
from adapeft.sections.section import plain


def to_yaml(config: Config) -> str:
    """Return the whole config, defaults included, as YAML that ``load_config`` reads."""
    # OmegaConf quotes strings that it would read as numbers, such as the revision 12e45; yaml.safe_dump does not.
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def defaults_yaml() -> str:
    """Return a config to start from: every key with its description and its default, or ``???`` if it has none.

    Keys of other variants of a section are in comments, under the variants' names.
    """
    blocks = []
    for name, field in Config.model_fields.items():
        if name in SECTIONS:
            keys = "\n".join([*_common(name), *_of_variants(name)])
            title = (SECTIONS[name].__doc__ or "").splitlines()[0]
            blocks.append(f"# {title}\n{name}:\n{textwrap.indent(keys, '  ')}")
        else:
            blocks.append(_documented(name, field))
    return "\n\n".join(blocks) + "\n"


def _common(section: str) -> list[str]:
    """Return the YAML of the keys that all variants of a section have."""
    keys = []
    for key, field in SECTIONS[section].model_fields.items():
        if f"{section}.{key}" == DECIDES.get(section):
            comment = _comment(f"{field.description} ({' | '.join(VARIANTS[section])})")
            keys.append(f"{comment}\n{key}: {usual(section)}")
        else:
            keys.append(_documented(key, field))
    return keys


def _of_variants(section: str) -> list[str]:
    """Return the YAML of the keys of single variants, under their names, in comments except for the default variant."""
    groups: dict[tuple[str, ...], list[str]] = {}
    entries: dict[str, list[str]] = {}
    for variant, one in VARIANTS.get(section, {}).items():
        for key, field in one.model_fields.items():
            if key not in SECTIONS[section].model_fields:
                entries.setdefault(_documented(key, field), []).append(variant)
    for entry, variants in entries.items():
        groups.setdefault(tuple(variants), []).append(entry)
    lines = []
    for names in sorted(groups, key=lambda names: usual(section) not in names):
        is_set = usual(section) in names
        decides = DECIDES[section].removeprefix(f"{section}.")
        lines.append(_comment(f"--- with {decides}: {listed(names, 'or')}"))
        lines += groups[names] if is_set else [textwrap.indent(entry, "# ") for entry in groups[names]]
    return lines


def _documented(key: str, field: FieldInfo) -> str:
    choices = f" ({' | '.join(get_args(field.annotation))})" if get_origin(field.annotation) is Literal else ""
    comment = _comment(f"{field.description}{choices}")
    return f"{comment}\n{key}: {'???' if field.is_required() else as_yaml(plain(field.default))}"


def _comment(text: str) -> str:
    return textwrap.fill(text, 114, initial_indent="# ", subsequent_indent="# ")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the config, with which editors complete and check YAML."""
    schema = Config.model_json_schema()
    # pydantic would spell out the fields of the default budget.
    for options in schema["$defs"].values():
        if "budget" in options.get("properties", {}):
            options["properties"]["budget"]["default"] = plain(KEYS["select.budget"].default)
    # The task is in another section; pydantic's schema would require that exactly one task's section matches.
    of_task = schema["properties"]["data"]["oneOf"]
    schema["properties"]["data"] = {"anyOf": of_task}
    schema["allOf"] = [
        {
            "if": {"properties": {"model": {"properties": {"task": {"const": task}}, "required": ["task"]}}},
            "then": {"properties": {"data": keys}},
        }
        for task, keys in zip(VARIANTS["data"], of_task, strict=True)
    ]
    return schema
