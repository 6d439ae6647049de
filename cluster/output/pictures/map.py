"""A map of layers and roles; without matplotlib, because the terminal shows it too."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

OUTSIDE = -1
"""Layer of parameters outside of any layer."""
_PLACE = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")


@dataclass(frozen=True)
class Map:
    """Sums of values by role and layer.

    Attributes:
        roles: roles, those of the largest sum first.
        layers: layers, ascending; ``OUTSIDE`` first, if there is anything.
        grid: sums, NaN where there is nothing. float64 [roles, layers].
        num_left_out: number of roles that are left out.
    """

    roles: tuple[str, ...]
    layers: tuple[int, ...]
    grid: np.ndarray
    num_left_out: int


def place_of(name: str) -> tuple[int, str]:
    """Return the layer and the role in a parameter's name; outside any layer -1 and the whole name."""
    found = _PLACE.fullmatch(name)
    return (int(found[1]), found[2]) if found else (OUTSIDE, name)


def map_of(values: Iterable[tuple[str, float]], most_roles: int) -> Map | None:
    """Return the map of values by parameter name; None if none is positive.

    Args:
        values: names and values; those that are not positive are left out.
        most_roles: number of roles to keep.
    """
    sums: defaultdict[str, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
    for parameter, value in values:
        if value > 0:
            layer, role = place_of(parameter)
            sums[role][layer] += value
    if not sums:
        return None
    ranked = sorted(sums, key=lambda role: -sum(sums[role].values()))
    roles = tuple(ranked[:most_roles])
    present = {layer for role in roles for layer in sums[role]}
    layers = (*([OUTSIDE] if OUTSIDE in present else []), *range(max(present) + 1))
    grid = np.array([[sums[role].get(layer, np.nan) for layer in layers] for role in roles])
    return Map(roles, layers, grid, len(ranked) - len(roles))


def shares_of(values: np.ndarray) -> np.ndarray:
    """Return values as shares of the sum of those that a map has, the positive ones. [K]."""
    total = values[values > 0].sum()
    return values / total if total > 0 else values
