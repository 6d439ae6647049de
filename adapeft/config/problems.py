"""The problems of an invalid config as lines that name the key, its value and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from adapeft.config.keys import DECIDES, KEYS, SECTIONS, VARIANTS, as_yaml, field_of, last_word, usual, variants_with
from adapeft.errors import did_you_mean
from adapeft.sections.section import plain

# Type of a pydantic error → the wanted value in terms of YAML instead of Python.
_WANTED = {
    "string_type": "a string, in quotes if YAML would read it as another type",
    "string_too_short": "not empty",
    "tuple_type": "a list",
    "too_short": "a list of one or more",
    "dict_type": "keys and values",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "finite",
    "byte_size": "bytes such as 24GiB",
    "byte_size_unit": "bytes such as 24GiB",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}


def phrase(details: Sequence[ErrorDetails], tree: Mapping[Any, Any]) -> list[str]:
    """Return one line per invalid key, such as ``train.epochs = -1: should be greater than 0 (passes over …)``."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        # pydantic reports each alternative of a union separately, under a path that is longer than the key's.
        found.setdefault(".".join(place(detail)), []).append(detail)
    return [_line(key, complaints, tree) for key, complaints in found.items()]


def place(detail: ErrorDetails) -> tuple[str, ...]:
    """Return the section, and the key of a key's error, without the variant that pydantic puts between them."""
    place = tuple(map(str, detail["loc"]))
    if place and place[0] in VARIANTS:
        if detail["type"] == "union_tag_invalid":
            return tuple(DECIDES[place[0]].split("."))
        return place[0], *place[2:3]
    return place[:2]


def _line(key: str, details: Sequence[ErrorDetails], tree: Mapping[Any, Any]) -> str:
    kind = details[0]["type"]
    section, _, name = key.partition(".")
    if kind == "extra_forbidden":
        others = variants_with(key)
        return _of_others(key, others, tree) if others else f"{key}: unknown key.{suggestion(key)}"
    if not key:  # a conflict between sections, whose message names its keys
        return str(details[0]["ctx"]["error"])
    if key not in KEYS and key not in SECTIONS:
        return f"{key}: {details[0]['msg']}"
    variant = str(details[0]["loc"][1]) if section in VARIANTS and len(details[0]["loc"]) > 1 else None
    described = "" if key in SECTIONS else f"({field_of(key, variant).description})"
    if kind == "missing":
        return f"{key}: required {described}"
    if is_conflict(section, *filter(None, (name,)), kind=kind):
        return f"{key}.{details[0]['ctx']['error']}"
    value = as_yaml(plain(_given(tree[section], name) if name else tree[section]))
    if key in SECTIONS:
        return f"{key} = {value}: is a section; write its keys below it, indented"
    if kind == "value_error":
        # The message of an AdapeftError already names field and value, but not the section.
        return f"{key} = {value}: {str(details[0]['ctx']['error']).partition(': ')[2]}"
    alternatives = dict.fromkeys(complaint(detail) for detail in details)
    guess = did_you_mean(value, re.findall(r"'([^']+)'", " ".join(alternatives)))
    return f"{key} = {value}: should be {' or '.join(alternatives)} {described}.{guess}"


def _of_others(key: str, others: Sequence[str], tree: Mapping[Any, Any]) -> str:
    """Return the line of a key that only other variants of its section have."""
    top, _, name = key.partition(".")
    decides, word = DECIDES[top], last_word(DECIDES[top])
    if len(others) == 1:
        whose, remedy = f"an option of {word} {others[0]}", f"set {decides}: {others[0]}"
    else:
        whose, remedy = f"an option of the {word}s {listed(others)}", "choose one of these"
    deciding = tree.get(decides.partition(".")[0])
    mine = deciding.get(word) if isinstance(deciding, Mapping) else None
    given = as_yaml(plain(_given(tree[top], name)))
    return f"{key} = {given}: is {whose}, and {decides} is {mine or usual(top)}. Leave it out, or {remedy}."


def _given(section: Mapping[str, Any], name: str) -> object:
    """Return the value of a key, which older configs have below ``rule``."""
    return section[name] if name in section else section["rule"][name]


def is_conflict(*place: str, kind: str) -> bool:
    """Return whether an error is a conflict of keys.

    pydantic runs the check of a whole section only if all its keys are valid by themselves.
    """
    if kind == "extra_forbidden":
        return bool(variants_with(".".join(place)))
    return kind == "value_error" and len(place) == 1 and place[0] in SECTIONS


def complaint(detail: ErrorDetails) -> str:
    """Return what the value should be, in terms of YAML."""
    if detail["type"] == "union_tag_invalid":
        *first, last = str(detail["ctx"]["expected_tags"]).split(", ")
        return f"{', '.join(first)} or {last}"
    if detail["type"] in _WANTED:
        return _WANTED[detail["type"]]
    return detail["msg"].removeprefix("Input should be ")


def suggestion(key: str) -> str:
    """Suggest keys with the same last word in other sections, else similar ones, of the same section if it has any."""
    word = last_word(key)
    names = [*KEYS, *SECTIONS]
    words = {last_word(name) for name in names}
    close = [word] if word in words else difflib.get_close_matches(word, sorted(words), n=2)
    matches = [name for name in names if last_word(name) in close]
    section = key.rpartition(".")[0]
    matches = [name for name in matches if section and name.rpartition(".")[0] == section] or matches
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else " `adapeft config` lists all keys."


def listed(words: Sequence[str], conjunction: str = "and") -> str:
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last
