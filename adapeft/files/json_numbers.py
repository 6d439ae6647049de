"""Standard JSON: infinities are the strings "inf" and "-inf", and NaN is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

from adapeft.errors import AdapeftError

_WORDS = {"inf": math.inf, "-inf": -math.inf}


def infinity_in_words(value: Any) -> Any:
    """Return an infinity as a string and any other value as it is."""
    return str(float(value)) if isinstance(value, float) and math.isinf(value) else value


def infinity_from_words(value: Any) -> Any:
    """Return the inverse of ``infinity_in_words``."""
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("nan is not a number")
    return value


Number = Annotated[
    float,
    BeforeValidator(infinity_from_words),
    AfterValidator(_not_nan),
    PlainSerializer(infinity_in_words, when_used="json"),
]
"""A float in a file that may be infinite, such as the perplexity of a loss above 709 nats."""


def dumps(content: Any, *, indent: int | None = None) -> str:
    """Return ``content`` as JSON, with infinities as strings.

    Raises:
        AdapeftError: a value is NaN. Names its key.
    """
    return json.dumps(_encoded(content, ""), indent=indent, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """Parse JSON; infinities remain strings.

    Raises:
        ValueError: the text is not JSON, or has ``NaN`` or ``Infinity``, which Python's parser would accept.
    """
    return json.loads(text, parse_constant=_refuse)


def decoded(tree: Any) -> Any:
    """Return ``tree`` with the infinities that ``dumps`` wrote as strings turned into numbers."""
    if isinstance(tree, Mapping):
        return {key: decoded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [decoded(value) for value in tree]
    return infinity_from_words(tree)


def undefined_as_null(tree: Any) -> Any:
    """Return ``tree`` with None for NaN, for quantities that may be undefined, such as a constant's correlation."""
    if isinstance(tree, Mapping):
        return {key: undefined_as_null(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [undefined_as_null(value) for value in tree]
    return None if isinstance(tree, float) and math.isnan(tree) else tree


def _encoded(tree: Any, key: str) -> Any:
    if isinstance(tree, Mapping):
        return {name: _encoded(value, f"{key}.{name}" if key else str(name)) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_encoded(value, f"{key}[{index}]") for index, value in enumerate(tree)]
    if isinstance(tree, float) and math.isnan(tree):
        raise AdapeftError(
            f"{key} = nan: this is not a number, so the result is not saved. Find out which step or which examples it "
            f"comes from."
        )
    return infinity_in_words(tree)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
