"""Configs in YAML: reading with overrides, checking before anything heavy is imported, and writing."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.scanner import ScannerError

from adapeft.config.config import Config
from adapeft.config.keys import DECIDES, KEYS, SECTIONS, VARIANTS, as_yaml, field_of, variants_with
from adapeft.errors import AdapeftError, ConflictError, did_you_mean
from adapeft.files.damage import check_yaml, reading
from adapeft.methods.options import AnyOptions
from adapeft.sections.section import Section, plain
from adapeft.sections.select import Select

S = TypeVar("S", bound=Section)

# --- reading ---------------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at ``path``, apply ``key=value`` overrides, check everything and make its paths absolute.

    A key is dotted (``select.budget=1%``), or only its last word if that is unambiguous (``budget=1%``).

    Raises:
        AdapeftError: the config is invalid; one error lists every problem.
    """
    return read_config(path, overrides).resolved()


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config like ``load_config``, but keep its paths as they are spelled."""
    tree, problems = read_tree(path, overrides)
    return parse_config(tree, source=str(path), problems=problems)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[Any, Any], list[str]]:
    """Return the unchecked content of a file with overrides applied, and the problems of invalid overrides."""
    tree = _read(Path(path))
    problems = _override(tree, overrides)
    with reading(f"{path}: a reference ${{…}} cannot be resolved", "Set the variable or correct the reference."):
        return _resolved(path, tree), problems


def parse_config(tree: Mapping[Any, Any], source: str = "config", problems: Sequence[str] = ()) -> Config:
    """Build the config from nested dictionaries.

    Args:
        tree: sections and keys.
        source: name of the config in messages.
        problems: problems found before, which are reported together with those found here.

    Raises:
        ConflictError: the keys are valid by themselves but not together.
        AdapeftError: there is any other problem.
    """
    tree = {key: value for key, value in tree.items() if not _is_missing(value)}
    # A section that is left out or left empty counts as empty, so that the error names the keys that it lacks.
    tree |= {name: {} for name in SECTIONS if tree.get(name) is None}
    for name, section in tree.items():
        if isinstance(section, Mapping):
            tree[name] = {key: value for key, value in section.items() if not _is_missing(value)}
    problems = list(problems)
    kind = AdapeftError
    try:
        config = Config.model_validate(tree, context=tree)
    except ValidationError as error:
        if not problems and all(_is_conflict(*_place(detail), kind=detail["type"]) for detail in error.errors()):
            kind = ConflictError
        problems += _phrase(error.errors(), tree)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise kind(f"{source} has {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def parse_select(options: Mapping[str, Any]) -> Select:
    """Build only the ``select`` section, for the library, which has no config."""
    try:
        return _SELECT.validate_python(options)
    except ValidationError as error:
        details = [{**detail, "loc": ("select", *detail["loc"])} for detail in error.errors()]
        raise AdapeftError("\n".join(_phrase(details, {"select": options}))) from None  # type: ignore[arg-type]


def parse_section(section: type[S], overrides: Sequence[str]) -> tuple[S, list[str]]:
    """Build a command's own section from the overrides that name its fields; return it and the other overrides."""
    given: dict[str, object] = {}
    others = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals and key.strip() in section.model_fields:
            given[key.strip()] = _value(text)
        else:
            others.append(override)
    try:
        return section.model_validate(given), others
    except ValidationError as error:
        lines: dict[str, str] = {}
        # An error of an item is more specific than one of its list.
        for detail in sorted(error.errors(), key=lambda detail: -len(detail["loc"])):
            name = str(detail["loc"][0])
            about = f"({section.model_fields[name].description})"
            said = (
                str(detail["ctx"]["error"])
                if detail["type"] == "value_error"
                else f"should be {_complaint(detail)} {about}"
            )
            lines.setdefault(name, f"{name} = {as_yaml(given[name])}: {said}")
        raise AdapeftError("\n".join(lines.values())) from None


_SELECT: TypeAdapter[Select] = TypeAdapter(AnyOptions)


def _is_missing(value: object) -> bool:
    """Return whether ``value`` is OmegaConf's mark of a missing value, which ``defaults_yaml`` writes."""
    return isinstance(value, str) and value == "???"


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        here = [sibling.name for sibling in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise AdapeftError(
            f"config = {path}: no such file.{did_you_mean(path.name, here)} `adapeft config` prints one to start from."
        )
    try:
        # OmegaConf asserts that a document is not a single string.
        with reading(f"{path}: cannot be read", "Correct it.", OmegaConfBaseException, AssertionError):
            check_yaml(path.read_text(encoding="utf-8"))
            # Not yaml.safe_load, which reads 1e-3 as a string and accepts duplicate keys.
            tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        hint = "\nA string that begins with * or % has to be in quotes." if isinstance(error, ScannerError) else ""
        raise AdapeftError(f"{path}: cannot be read: {error}{hint}") from error
    if not isinstance(tree, DictConfig):
        raise AdapeftError(f"{path}: should be sections and keys such as `seed: 0`, not a list.")
    return tree


def _resolved(path: str | Path, tree: DictConfig) -> dict[Any, Any]:
    try:
        given = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise AdapeftError(f"{path}: {error.full_key}: {reason}; set the variable or correct the reference") from error
    assert isinstance(given, dict)
    return given


def _override(tree: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Write the overrides into ``tree`` and return the problems of the invalid ones."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            if not equals:
                raise AdapeftError(f"{override}: an override is written key=value")
            OmegaConf.update(tree, _full_key(key.strip(), text), _value(text), force_add=True)
        except AdapeftError as error:
            problems.append(str(error))
    return problems


def _full_key(key: str, text: str) -> str:
    """Return the dotted path of ``key``, which may be only the last word of it."""
    if "." in key or key in KEYS:
        return key
    candidates = [known for known in KEYS if _last_word(known) == key]
    if len(candidates) == 1 and key not in SECTIONS:
        return candidates[0]
    if candidates:
        spellings = " or ".join(f"{candidate}={text}" for candidate in candidates)
        raise AdapeftError(f"{key}={text}: {key!r} has more than one meaning; write {spellings}")
    if key in SECTIONS:
        raise AdapeftError(f"{key}={text}: {key!r} is a section; write {key}.KEY=VALUE")
    raise AdapeftError(f"{key}: unknown key.{_suggestion(key)}")


def _value(text: str) -> object:
    """Return ``text`` parsed as YAML, or as it is where it is not valid YAML, such as ``*embeddings*``."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except yaml.YAMLError:
        return text


# --- problems --------------------------------------------------------------------------------------------------------

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


def _phrase(details: Sequence[ErrorDetails], tree: Mapping[Any, Any]) -> list[str]:
    """Return one line per invalid key, such as ``train.epochs = -1: should be greater than 0 (passes over …)``."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        # pydantic reports each alternative of a union separately, under a path that is longer than the key's.
        found.setdefault(".".join(_place(detail)), []).append(detail)
    return [_line(key, complaints, tree) for key, complaints in found.items()]


def _place(detail: ErrorDetails) -> tuple[str, ...]:
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
        return _of_others(key, others, tree) if others else f"{key}: unknown key.{_suggestion(key)}"
    if key not in KEYS and key not in SECTIONS:
        return f"{key}: {details[0]['msg']}"
    variant = str(details[0]["loc"][1]) if section in VARIANTS and len(details[0]["loc"]) > 1 else None
    described = "" if key in SECTIONS else f"({field_of(key, variant).description})"
    if kind == "missing":
        return f"{key}: required {described}"
    if _is_conflict(section, *filter(None, (name,)), kind=kind):
        return f"{key}.{details[0]['ctx']['error']}"
    value = as_yaml(plain(_given(tree[section], name) if name else tree[section]))
    if key in SECTIONS:
        return f"{key} = {value}: is a section; write its keys below it, indented"
    if kind == "value_error":
        # The message of an AdapeftError already names field and value, but not the section.
        return f"{key} = {value}: {str(details[0]['ctx']['error']).partition(': ')[2]}"
    alternatives = dict.fromkeys(_complaint(detail) for detail in details)
    guess = did_you_mean(value, re.findall(r"'([^']+)'", " ".join(alternatives)))
    return f"{key} = {value}: should be {' or '.join(alternatives)} {described}.{guess}"


def _of_others(key: str, others: Sequence[str], tree: Mapping[Any, Any]) -> str:
    """Return the line of a key that only other variants of its section have."""
    top, _, name = key.partition(".")
    decides, word = DECIDES[top], _last_word(DECIDES[top])
    if len(others) == 1:
        whose, remedy = f"an option of {word} {others[0]}", f"set {decides}: {others[0]}"
    else:
        whose, remedy = f"an option of the {word}s {_listed(others)}", "choose one of these"
    deciding = tree.get(decides.partition(".")[0])
    mine = deciding.get(word) if isinstance(deciding, Mapping) else None
    given = as_yaml(plain(_given(tree[top], name)))
    return f"{key} = {given}: is {whose}, and {decides} is {mine or _usual(top)}. Leave it out, or {remedy}."


def _usual(section: str) -> str:
    """Return the default variant of a section."""
    default = Config.model_fields[section].default
    return getattr(default, _last_word(DECIDES[section]), next(iter(VARIANTS[section])))


def _given(section: Mapping[str, Any], name: str) -> object:
    """Return the value of a key, which older configs have below ``rule``."""
    return section[name] if name in section else section["rule"][name]


def _is_conflict(*place: str, kind: str) -> bool:
    """Return whether an error is a conflict of keys.

    pydantic runs the check of a whole section only if all its keys are valid by themselves.
    """
    if kind == "extra_forbidden":
        return bool(variants_with(".".join(place)))
    return kind == "value_error" and len(place) == 1 and place[0] in SECTIONS


def _complaint(detail: ErrorDetails) -> str:
    """Return what the value should be, in terms of YAML."""
    if detail["type"] == "union_tag_invalid":
        *first, last = str(detail["ctx"]["expected_tags"]).split(", ")
        return f"{', '.join(first)} or {last}"
    if detail["type"] in _WANTED:
        return _WANTED[detail["type"]]
    return detail["msg"].removeprefix("Input should be ")


def _suggestion(key: str) -> str:
    """Suggest keys with the same last word in other sections, else those with a similar one."""
    word = _last_word(key)
    names = [*KEYS, *SECTIONS]
    words = {_last_word(name) for name in names}
    close = [word] if word in words else difflib.get_close_matches(word, sorted(words), n=2)
    matches = [repr(name) for name in names if _last_word(name) in close]
    return f" Did you mean {' or '.join(matches)}?" if matches else " `adapeft config` lists all keys."


# --- writing ---------------------------------------------------------------------------------------------------------


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
            keys.append(f"{comment}\n{key}: {_usual(section)}")
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
    for names in sorted(groups, key=lambda names: _usual(section) not in names):
        is_set = _usual(section) in names
        decides = DECIDES[section].removeprefix(f"{section}.")
        lines.append(_comment(f"--- with {decides}: {_listed(names, 'or')}"))
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


def _listed(words: Sequence[str], conjunction: str = "and") -> str:
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def _last_word(key: str) -> str:
    return key.rpartition(".")[2]
