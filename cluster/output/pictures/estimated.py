"""Estimated memory of a stage; without matplotlib, because every command on a run imports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Estimated(NamedTuple):
    """Estimated memory of a stage on one device.

    Attributes:
        parts: bytes by part.
        is_bound: whether the activations are an upper bound.
    """

    parts: Mapping[str, int]
    is_bound: bool
