"""Maps of layers and roles: where the chosen parameters and the influence are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import PercentFormatter

from adapeft.subset.subset import Subset
from cluster.output.pictures.map import OUTSIDE, map_of, shares_of
from cluster.output.pictures.picture import Picture, new_figure, png_of

_MOST_ROLES = 24


def draw_chosen(subset: Subset, chosen: Subset | None) -> Picture | None:
    """Draw how many parameters of each layer and role were chosen; None if there are none.

    Args:
        subset: what is trained.
        chosen: what of it was chosen; None if its draw cannot be told apart.
    """
    shown = chosen or subset
    counts = [(name, float(part.count)) for name, part in shown.parts.items()]
    unit = "trained parameters"
    caption = "Number of trained parameters by role (rows) and layer (columns); empty where nothing is trained."
    if drawn := subset.choice.num_drawn:
        said = f"{subset.count - drawn:,} parameters were chosen, and {drawn:,} drawn at random among all others"
        if chosen is None:
            caption += f" {said}; both are counted."
        else:
            unit = "chosen parameters"
            caption = (
                f"Number of chosen parameters by role (rows) and layer (columns); empty where none was chosen. {said}, "
                "which are trained too, but not shown."
            )
    return _draw_map("chosen", "What was chosen", caption, unit, counts, log=True)


def draw_influence(names: Sequence[str], influence: np.ndarray, unit: str, one_by_one: str | None) -> Picture | None:
    """Draw the influence of each layer and role; None if all of it is 0.

    Args:
        names: name of each group's parameter.
        influence: influence of each group. [K].
        unit: what influence is.
        one_by_one: why only its shares mean anything; None if it adds up.
    """
    if one_by_one is None:
        caption = (
            f"Influence of all candidates by role (rows) and layer (columns), summed: the {unit} of each group; empty "
            "where it is 0."
        )
        return _draw_map("influence", "Influence", caption, "influence", zip(names, influence, strict=True), log=False)
    caption = (
        f"Share of the influence ({unit}) of all candidates by role (rows) and layer (columns); empty where it is 0. "
        f"{one_by_one}"
    )
    shares = zip(names, shares_of(influence), strict=True)
    return _draw_map("influence", "Influence", caption, "share of the influence", shares, log=False, percent=True)


def _draw_map(
    name: str,
    title: str,
    caption: str,
    unit: str,
    values: Iterable[tuple[str, float]],
    *,
    log: bool,
    percent: bool = False,
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
    step = -(-len(layers) // 10)
    ticks = range(0, len(layers), step)
    axes.set_xticks(list(ticks), ["–" if layers[tick] == OUTSIDE else str(layers[tick]) for tick in ticks])
    # Names are no formulas, whatever they contain.
    axes.set_yticks(range(len(found.roles)), [_short(role) for role in found.roles], fontsize=8, parse_math=False)
    axes.set_xlabel("layer" + (" (–: outside of the layers)" if OUTSIDE in layers else ""))
    figure.colorbar(image, ax=axes, label=unit, format=PercentFormatter(1.0) if percent else None)
    return Picture(name, title, caption, png_of(figure))


def _short(role: str, longest: int = 32) -> str:
    return role if len(role) <= longest else f"…{role[1 - longest :]}"
