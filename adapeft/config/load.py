"""Configs in YAML: read with overrides, and checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml.scanner import ScannerError

from adapeft.config.config import Config
from adapeft.config.keys import KEYS, SECTIONS, as_yaml, last_word
from adapeft.config.problems import complaint, is_conflict, phrase, place, suggestion
from adapeft.errors import AdapeftError, ConflictError, did_you_mean
from adapeft.files.damage import check_yaml, reading
from adapeft.methods.options import AnyOptions
from adapeft.sections.section import Section
from adapeft.sections.select import Select

S = TypeVar("S", bound=Section)


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
        if not problems and all(is_conflict(*place(detail), kind=detail["type"]) for detail in error.errors()):
            kind = ConflictError
        problems += phrase(error.errors(), tree)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise kind(f"{source} has {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def parse_select(options: Mapping[str, Any]) -> Select:
    """Build only the ``select`` section, for the library, which has no config.

    Raises:
        AdapeftError: some options are unknown or invalid; the message lists all.
    """
    try:
        return _SELECT.validate_python(options)
    except ValidationError as error:
        details = [{**detail, "loc": ("select", *detail["loc"])} for detail in error.errors()]
        raise AdapeftError("\n".join(phrase(details, {"select": options}))) from None  # type: ignore[arg-type]


def parse_section(section: type[S], overrides: Sequence[str]) -> tuple[S, list[str]]:
    """Build a command's own section from the overrides that name its fields; return it and the other overrides.

    Raises:
        AdapeftError: some values are invalid; the message lists all.
    """
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
            reason = (
                str(detail["ctx"]["error"])
                if detail["type"] == "value_error"
                else f"should be {complaint(detail)} {about}"
            )
            lines.setdefault(name, f"{name} = {as_yaml(given[name])}: {reason}")
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
    candidates = [known for known in KEYS if last_word(known) == key]
    if len(candidates) == 1 and key not in SECTIONS:
        return candidates[0]
    if candidates:
        spellings = " or ".join(f"{candidate}={text}" for candidate in candidates)
        raise AdapeftError(f"{key}={text}: {key!r} has more than one meaning; write {spellings}")
    if key in SECTIONS:
        raise AdapeftError(f"{key}={text}: {key!r} is a section; write {key}.KEY=VALUE")
    raise AdapeftError(f"{key}: unknown key.{suggestion(key)}")


def _value(text: str) -> object:
    """Return ``text`` parsed as YAML, or as it is where it is not valid YAML, such as ``*embeddings*``."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except yaml.YAMLError:
        return text
