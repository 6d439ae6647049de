"""Errors and warnings that the user has to act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdapeftError(ValueError):
    """Bad input. The message names the field, the value and the remedy; the command prints it without a traceback."""


class ConflictError(AdapeftError):
    """Keys of a section that are valid by themselves but not together."""


class RoundingWarning(UserWarning):
    """Updates that are lost to rounding in a low-precision dtype, or will be."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'a' or 'b'?"`` for the known words closest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
