"""Maps of layers and roles: where the chosen parameters and the influence are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.colors import LogNorm, Normalize

from adapeft.subset.subset import Subset
from cluster.output.pictures.map import OUTSIDE, map_of
from cluster.output.pictures.picture import Picture, new_figure, png_of

_MOST_ROLES = 24


def draw_chosen(subset: Subset) -> Picture | None:
    """Draw how many parameters of each layer and role are trained; None if there are none."""
    counts = [(name, float(part.count)) for name, part in subset.parts.items()]
    caption = "Number of trained parameters by role (rows) and layer (columns); empty where nothing is trained."
    return _draw_map("chosen", "What was chosen", caption, "trained parameters", counts, log=True)


def draw_influence(names: Iterable[str], influence: Iterable[float], unit: str) -> Picture | None:
    """Draw the influence of each layer and role; None if all of it is 0.

    Args:
        names: name of each group's parameter.
        influence: influence of each group.
        unit: what influence is.
    """
    caption = (
        f"Influence of all candidates by role (rows) and layer (columns), summed: the {unit} of each group; empty "
        "where it is 0."
    )
    return _draw_map("influence", "Influence", caption, "influence", zip(names, influence, strict=True), log=False)


def _draw_map(
    name: str, title: str, caption: str, unit: str, values: Iterable[tuple[str, float]], *, log: bool
) -> Picture | None:
    found = map_of(values, _MOST_ROLES)
    if found is None:
        return None
    if found.num_left_out:
        caption += f" The {_MOST_ROLES} largest of {len(found.roles) + found.num_left_out} roles are shown."
    layers, grid = found.layers, found.grid
    norm = LogNorm() if log and np.nanmin(grid) < np.nanmax(grid) else Normalize(vmin=0)
    figure = new_figure(1.3 + 0.24 * len(found.roles))
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis_r", norm=norm, interpolation="nearest")
    step = -(-len(layers) // 12)
    ticks = range(0, len(layers), step)
    axes.set_xticks(list(ticks), ["–" if layers[tick] == OUTSIDE else str(layers[tick]) for tick in ticks])
    # Names are no formulas, whatever they contain.
    axes.set_yticks(range(len(found.roles)), [_short(role) for role in found.roles], fontsize=8, parse_math=False)
    axes.set_xlabel("layer" + (" (–: outside of the layers)" if OUTSIDE in layers else ""))
    figure.colorbar(image, ax=axes, label=unit)
    return Picture(name, title, caption, png_of(figure))


def _short(role: str, longest: int = 32) -> str:
    return role if len(role) <= longest else f"…{role[1 - longest :]}"
