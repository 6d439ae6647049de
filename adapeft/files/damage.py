"""What every loader of a file does with one that is damaged: the parser's error becomes the user's."""

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

# What parsers raise on bytes and values that they do not expect. Deep nesting ends in a RecursionError, a number of
# many digits in a ValueError, one that no machine word holds in an OverflowError.
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
"""References among n texts resolve to at most e^(n/e) others: about 1,500."""

MOST = 2**53
"""No number of elements or bytes in a file is larger: floats count as far, and 64 bits do not wrap round."""
Count = Annotated[int, Field(ge=0, le=MOST)]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Text that goes to a terminal: without control characters, which could do anything there."""


class Header(BaseModel):
    """What a file says of itself, checked: numbers are numbers, no text is taken for one; other keys are left aside."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


@contextmanager
def reading(complaint: str, remedy: str, *parser_errors: type[Exception]) -> Iterator[None]:
    """Within it, whatever a damaged file makes a parser raise becomes ``{complaint} ({reason}). {remedy}``.

    Keep the block to reading and checking the file: a bug of ours in it would look like damage.

    Args:
        complaint: names the file.
        remedy: a sentence.
        parser_errors: the parser's own, where they are no kind of ``ValueError``.
    """
    try:
        yield
    except AdapeftError:
        raise
    except DAMAGE + parser_errors as error:
        raise AdapeftError(f"{complaint} ({_reason(error)}). {remedy}") from error


def check_yaml(text: str) -> None:
    """Checks that YAML is a plain tree, by its events, before anything is made of it.

    A few lines of aliases or of references to references are worth billions of values. Tags make objects.

    Raises:
        ValueError: aliases, tags, deep nesting, a great many references, or more text than a person writes.
        yaml.YAMLError: no YAML.
    """
    if len(text) > _LONGEST_YAML:
        raise ValueError(f"{len(text)} characters, at most {_LONGEST_YAML}")
    depth = num_references = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_YAML:
            raise ValueError(f"nested more than {_DEEPEST_YAML} deep")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"*{event.anchor} is an alias: write it out, and text that begins with * in quotes")
        if (tag := getattr(event, "tag", None)) is not None:
            raise ValueError(f"{tag} is a tag: write the value without it")
        if isinstance(event, yaml.ScalarEvent):
            num_references += event.value.count("${")
    if num_references > _MOST_REFERENCES:
        raise ValueError(f"{num_references} references ${{…}}, at most {_MOST_REFERENCES}")


def load_json(path: Path, expected: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        AdapeftError: missing, no JSON, or no object.
    """
    with reading(f"{path} is not {expected}, or it is truncated", remedy):
        content = loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping):
            raise TypeError(f"{type(content).__name__} instead of keys and values")
        return dict(content)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        detail = error.errors(include_url=False, include_context=False)[0]
        said = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
    elif isinstance(error, KeyError):
        said = f"no {error}"
    else:
        said = str(error) or type(error).__name__
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", " ".join(said.split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
