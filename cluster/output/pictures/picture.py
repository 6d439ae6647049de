"""A picture: a PNG with its title and caption."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter

from adapeft.files.artifact import save

WIDTH = 5.0
"""Inches. Text of 10 points stays readable on a screen of 400 pixels."""
DOTS_PER_INCH = 160


@dataclass(frozen=True)
class Picture:
    """A figure as a PNG on white, which is readable on light and dark pages.

    Attributes:
        name: name of its file, without the ending.
        title: what it shows, in a few words.
        caption: what is on its axes and how to read it.
        png: content of the PNG file.
    """

    name: str
    title: str
    caption: str
    png: bytes

    def write(self, path: Path) -> None:
        path.write_bytes(self.png)


def new_figure(height: float) -> Figure:
    """Return an empty figure of ``WIDTH`` by ``height`` inches, outside the global state of pyplot."""
    return Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")


class _CountFormatter(LogFormatter):
    """Labels of a logarithmic axis where matplotlib puts them, as 300, 3 k and 3 M instead of powers of ten."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return EngFormatter()(x) if super().__call__(x, pos) else ""


def count_along(axes: Axes) -> None:
    """Make the horizontal axis a logarithmic one of counts."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_CountFormatter())
    axes.xaxis.set_minor_formatter(_CountFormatter())


def add_legend(figure: Figure, num_columns: int, *handles_and_labels: list[Any]) -> None:
    """Put the legend below the axes; without handles and labels, of everything that is labelled."""
    figure.legend(*handles_and_labels, loc="outside lower center", ncols=num_columns, frameon=False, fontsize=8)


def save_pictures(folder: Path, pictures: Iterable[Picture]) -> None:
    """Write each picture as a PNG file into ``folder``."""
    for picture in pictures:
        save(folder / f"{picture.name}.png", picture.write)


def png_of(figure: Figure) -> bytes:
    """Return the figure as the content of a PNG file."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
