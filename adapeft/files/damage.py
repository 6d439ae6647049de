"""Reading of files that may be damaged: errors of parsers become an ``AdapeftError``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from adapeft.errors import AdapeftError
from adapeft.files.json_numbers import loads

# Exceptions of parsers on unexpected bytes and values. Deep nesting raises RecursionError, a number with many digits
# ValueError, one that exceeds a machine word OverflowError.
DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
_LONGEST = 300
_LONGEST_YAML = 2**18
_DEEPEST_YAML = 20
_MOST_REFERENCES = 20
"""n references, spread over texts that refer to each other, resolve to at most e^(n/e) values: about 1,500."""

MOST = 2**53
"""Limit on numbers of elements or bytes in a file: exact in float64, and far from overflow in int64."""
Count = Annotated[int, Field(ge=0, le=MOST)]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Text that is printed to a terminal: no control characters, which could manipulate it."""


class Header(BaseModel):
    """Base class of checked file headers: types are strict (no text is read as a number), other keys are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


@contextmanager
def reading(complaint: str, remedy: str, *parser_errors: type[Exception]) -> Iterator[None]:
    """Turn any error of a parser within the context into ``AdapeftError("{complaint} ({reason}). {remedy}")``.

    Only read and check the file in the context: any bug of ours in it would look like damage.

    Args:
        complaint: start of the message, with the name of the file.
        remedy: last sentence of the message.
        parser_errors: additional exceptions of the parser that are not in ``DAMAGE``.
    """
    try:
        yield
    except AdapeftError:
        raise
    except DAMAGE + parser_errors as error:
        raise AdapeftError(f"{complaint} ({_reason(error)}). {remedy}") from error


def check_yaml(text: str) -> None:
    """Check by its events, before anything is built, that YAML is a plain tree.

    A few lines of aliases or of references to references can expand to billions of values. Tags create objects.

    Raises:
        ValueError: the text has aliases, tags, deep nesting or too many references, or is too long.
        yaml.YAMLError: the text is not YAML.
    """
    if len(text) > _LONGEST_YAML:
        raise ValueError(f"{len(text)} characters, at most {_LONGEST_YAML}")
    depth = num_references = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_YAML:
            raise ValueError(f"nested more than {_DEEPEST_YAML} deep")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"*{event.anchor} is an alias: write out its value, or put text that begins with * in quotes"
            )
        if (tag := getattr(event, "tag", None)) is not None:
            raise ValueError(f"{tag} is a tag: write the value without it")
        if isinstance(event, yaml.ScalarEvent):
            num_references += event.value.count("${")
    if num_references > _MOST_REFERENCES:
        raise ValueError(f"{num_references} references ${{…}}, at most {_MOST_REFERENCES}")


def load_json(path: Path, expected: str, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        AdapeftError: the file is missing, not JSON, or not an object.
    """
    with reading(f"{path} is not {expected}, or it is truncated", remedy):
        content = loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping):
            raise TypeError(f"{type(content).__name__} instead of keys and values")
        return dict(content)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        detail = error.errors(include_url=False, include_context=False)[0]
        reason = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
    elif isinstance(error, KeyError):
        reason = f"no {error}"
    else:
        reason = str(error) or type(error).__name__
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", " ".join(reason.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
