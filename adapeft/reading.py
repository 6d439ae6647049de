"""What every loader of a file does with one that is damaged: the parser's error becomes the user's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from adapeft.errors import AdapeftError

# What parsers raise on bytes and values that they do not expect. Deep nesting ends in a RecursionError, a number of
# many digits in a ValueError, one that no machine word holds in an OverflowError.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
_LONGEST = 300

MOST = 2**53
"""No number of elements or bytes in a file is larger: floats count as far, and 64 bits do not wrap round."""
Count = Annotated[int, Field(ge=0, le=MOST)]

H = TypeVar("H", bound="Header")


class Header(BaseModel):
    """What a file says of itself, checked: numbers are numbers, no text is taken for one; other keys are left aside."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    @classmethod
    def of(cls: type[H], content: Any) -> H:
        """The header that JSON ``content`` spells; within ``reading``, which reports what is wrong with it."""
        return cls.model_validate(content)


@contextmanager
def reading(complaint: str, remedy: str) -> Iterator[None]:
    """Within it, whatever a damaged file makes a parser raise becomes ``{complaint} ({reason}). {remedy}``.

    Keep the block to reading and checking the file: a bug of ours in it would look like damage.
    """
    try:
        yield
    except AdapeftError:
        raise
    except _DAMAGE as error:
        raise AdapeftError(f"{complaint} ({_reason(error)}). {remedy}") from error


def load_json(path: Path, expected: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        AdapeftError: missing, no JSON, or no object.
    """
    with reading(f"{path} is not {expected}, or it is truncated", remedy):
        content = json.loads(path.read_text())
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
    line = " ".join(said.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
