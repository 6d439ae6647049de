"""A config in YAML: read with overrides, checked whole before anything heavy is imported, and written back."""

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
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.scanner import ScannerError

from adapeft.config.config import Config
from adapeft.config.keys import KEYS, SECTIONS, as_yaml, plain
from adapeft.errors import AdapeftError, ConflictError, did_you_mean
from adapeft.files.damage import check_yaml, reading
from adapeft.sections.section import Section
from adapeft.sections.select import Select

S = TypeVar("S", bound=Section)

# --- reading ---------------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the YAML file at ``path``, applies ``key=value`` overrides, checks all of it and makes its paths absolute.

    A key is dotted (``select.budget=1%``), or its last word alone where that is unambiguous (``budget=1%``).
    Raises one ``AdapeftError`` that lists every problem.
    """
    return read_config(path, overrides).resolved()


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The same with paths as they are spelled."""
    tree = _read(Path(path))
    problems = _override(tree, overrides)
    with reading(f"{path}: a reference ${{…}} leads nowhere", "Set the variable or mend the reference."):
        given = _resolved(path, tree)
    return parse_config(given, source=str(path), problems=problems)


def parse_config(tree: Mapping[Any, Any], source: str = "config", problems: Sequence[str] = ()) -> Config:
    """The config that nested dictionaries spell; ``problems`` are those already found on the way here."""
    tree = {key: value for key, value in tree.items() if not _is_missing(value)}
    # A section that is left out or left empty counts as empty, so that the error names the keys that it lacks.
    tree |= {name: {} for name in SECTIONS if tree.get(name) is None}
    for name, section in tree.items():
        if isinstance(section, Mapping):
            tree[name] = {key: value for key, value in section.items() if not _is_missing(value)}
    problems = list(problems)
    kind = AdapeftError
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        if not problems and all(_is_conflict(detail) for detail in error.errors()):
            kind = ConflictError
        problems += _phrase(error.errors(), tree)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise kind(f"{source} has {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def parse_select(options: Mapping[str, Any]) -> Select:
    """The ``select`` section alone, for the library, which has no config."""
    try:
        return Select.model_validate(options)
    except ValidationError as error:
        details = [{**detail, "loc": ("select", *detail["loc"])} for detail in error.errors()]
        raise AdapeftError("\n".join(_phrase(details, {"select": options}))) from None  # type: ignore[arg-type]


def parse_section(section: type[S], overrides: Sequence[str]) -> tuple[S, list[str]]:
    """A section that a command takes beside the config, from those overrides that name its fields; and the others."""
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
        # What is wrong with an item says more than that the list lacks it.
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


def _is_missing(value: object) -> bool:
    """OmegaConf's mark for what the reader of a config has to fill in; ``defaults_yaml`` writes it."""
    return isinstance(value, str) and value == "???"


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        here = [sibling.name for sibling in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise AdapeftError(
            f"config = {path}: no such file.{did_you_mean(path.name, here)} `adapeft config` prints one to start from."
        )
    try:
        # OmegaConf asserts that a document is no single text.
        with reading(f"{path}: cannot be read", "Mend it.", OmegaConfBaseException, AssertionError):
            check_yaml(path.read_text(encoding="utf-8"))
            # Not yaml.safe_load: it reads 1e-3 as text and lets a key that is given twice pass.
            tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        hint = "\nText that begins with * or % has to be in quotes." if isinstance(error, ScannerError) else ""
        raise AdapeftError(f"{path}: cannot be read: {error}{hint}") from error
    if not isinstance(tree, DictConfig):
        raise AdapeftError(f"{path}: should be sections and keys such as `seed: 0`, not a list.")
    return tree


def _resolved(path: str | Path, tree: DictConfig) -> dict[Any, Any]:
    try:
        given = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise AdapeftError(f"{path}: {error.full_key}: {reason}; set the variable or mend the reference") from error
    assert isinstance(given, dict)
    return given


def _override(tree: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Writes the overrides into ``tree``; returns the problems of those that make no sense."""
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
    """The dotted path of ``key``, which may be a last word alone."""
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
    """What YAML makes of ``text``, and the text itself where YAML refuses it, as it does ``*embeddings*``."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except yaml.YAMLError:
        return text


# --- problems --------------------------------------------------------------------------------------------------------

# What pydantic says in the words of Python, in the words of YAML.
_WANTED = {
    "string_type": "text, in quotes if YAML takes it for something else",
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
    """A line for each key that is wrong, such as ``train.epochs = -1: should be greater than 0 (passes over …)``."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        # pydantic reports each alternative of a union by itself, under a path that is longer than the key's.
        found.setdefault(".".join(map(str, detail["loc"][:2])), []).append(detail)
    return [_line(key, complaints, tree) for key, complaints in found.items()]


def _line(key: str, details: Sequence[ErrorDetails], tree: Mapping[Any, Any]) -> str:
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key.{_suggestion(key)}"
    if key not in KEYS and key not in SECTIONS:
        return f"{key}: {details[0]['msg']}"
    if kind == "missing":
        return f"{key}: required ({KEYS[key].description})"
    if _is_conflict(details[0]):
        return f"{key}.{details[0]['ctx']['error']}"
    section, _, name = key.partition(".")
    value = as_yaml(tree[section][name] if name else tree[section])
    if key in SECTIONS:
        return f"{key} = {value}: is a section; write its keys below it, indented"
    if kind == "value_error":
        # An AdapeftError has named field and value already, but not the section.
        return f"{key} = {value}: {str(details[0]['ctx']['error']).partition(': ')[2]}"
    alternatives = dict.fromkeys(_complaint(detail) for detail in details)
    guess = did_you_mean(value, re.findall(r"'([^']+)'", " ".join(alternatives)))
    return f"{key} = {value}: should be {' or '.join(alternatives)} ({KEYS[key].description}).{guess}"


def _is_conflict(detail: ErrorDetails) -> bool:
    """Whether keys do not go together: a section's complaint, which pydantic makes of no section with a wrong key."""
    return detail["type"] == "value_error" and len(detail["loc"]) == 1 and detail["loc"][0] in SECTIONS


def _complaint(detail: ErrorDetails) -> str:
    """What the value should be, in the words of someone who writes YAML."""
    if detail["type"] in _WANTED:
        return _WANTED[detail["type"]]
    return detail["msg"].removeprefix("Input should be ")


def _suggestion(key: str) -> str:
    """Keys of the same last word in other sections, else those with a similar one."""
    word = _last_word(key)
    names = [*KEYS, *SECTIONS]
    words = {_last_word(name) for name in names}
    close = [word] if word in words else difflib.get_close_matches(word, sorted(words), n=2)
    matches = [repr(name) for name in names if _last_word(name) in close]
    return f" Did you mean {' or '.join(matches)}?" if matches else " `adapeft config` lists all keys."


# --- writing ---------------------------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as ``load_config`` reads it."""
    # OmegaConf quotes the text that it would read as a number, such as the revision 12e45; yaml.safe_dump does not.
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def defaults_yaml() -> str:
    """A config to start from: each key under a line that explains it, with its default or ``???`` where it has none."""
    blocks = []
    for name, field in Config.model_fields.items():
        if name in SECTIONS:
            keys = "\n".join(_documented(key, inner) for key, inner in SECTIONS[name].model_fields.items())
            blocks.append(f"# {SECTIONS[name].__doc__}\n{name}:\n{textwrap.indent(keys, '  ')}")
        else:
            blocks.append(_documented(name, field))
    return "\n\n".join(blocks) + "\n"


def _documented(key: str, field: FieldInfo) -> str:
    choices = f" ({' | '.join(get_args(field.annotation))})" if get_origin(field.annotation) is Literal else ""
    comment = textwrap.fill(f"{field.description}{choices}", 116, initial_indent="# ", subsequent_indent="# ")
    return f"{comment}\n{key}: {'???' if field.is_required() else as_yaml(plain(field.default))}"


def json_schema() -> dict[str, Any]:
    """JSON schema of the config, for editors that complete and check YAML."""
    schema = Config.model_json_schema()
    # pydantic would spell out the fields of the default budget.
    schema["$defs"]["Select"]["properties"]["budget"]["default"] = plain(KEYS["select.budget"].default)
    return schema


def _last_word(key: str) -> str:
    return key.rpartition(".")[2]
