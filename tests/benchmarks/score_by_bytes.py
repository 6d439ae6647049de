"""Score against shipped bytes on the four tasks of the encoder, drawn from the tables of their results pages.

``python -m tests.benchmarks.score_by_bytes`` reads the tables of swept methods in the sections *With a rate for the
head*, and writes ``tests/benchmarks/results/score_by_bytes.png``. Variants of the default (``fill=true``) are left out.
"""

from __future__ import annotations

import re
from statistics import mean

from cluster.output.pictures.picture import add_legend, count_along, new_figure, png_of
from tests.benchmarks.report import RESULTS

PAGES = {"stsb": "STS-B", "mrpc": "MRPC", "docstrings": "docstrings", "cola": "CoLA"}
METHODS = {"adapeft": "adapeft (the default)", "random": "random elements", "lora": "LoRA"}
VARIANT = re.compile("fill=|alone")

Point = tuple[float, float, float]
"""KiB of the delta, mean score, standard deviation over the seeds."""


def main() -> None:
    path = RESULTS / "score_by_bytes.png"
    pages = {title: (RESULTS / f"{page}.md").read_text(encoding="utf-8") for page, title in PAGES.items()}
    path.write_bytes(draw({title: curves_of(page) for title, page in pages.items()}))
    print(path)


def curves_of(page: str) -> dict[str, list[Point]]:
    """Return the points of each method, in the order of their bytes, from the tables of a page's section."""
    section = page.split("\n## With a rate for the head\n")[1].split("\n## ")[0]
    curves: dict[str, list[Point]] = {method: [] for method in METHODS}
    for table in (block for block in section.split("\n\n") if block.startswith("|")):
        header, _, *rows = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines())
        if not header[-1].startswith("held out"):
            continue
        for name, score, *others in rows:
            method = re.split(r"[ ,]", name)[0]
            if method in METHODS and not VARIANT.search(name):
                average, deviation = score.split(" ± ")
                sizes = dict(zip(header[2:], others, strict=True))["delta KiB"].split(" to ")
                kib = mean(float(size.replace(",", "")) for size in sizes)
                curves[method].append((kib, float(average), float(deviation)))
    return {method: sorted(points) for method, points in curves.items()}


def draw(tasks: dict[str, dict[str, list[Point]]]) -> bytes:
    """Return the picture of all tasks, one panel each: means over the seeds with standard deviations."""
    figure = new_figure(5.2)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (title, curves) in zip(panels.flat, tasks.items(), strict=True):
        for index, (method, points) in enumerate(curves.items()):
            kib, means, errors = zip(*points, strict=True)
            # A ring around what it is level with: where the default is the draw, both are seen.
            shape = {"fillstyle": "none", "markersize": 9} if method == "adapeft" else {"markersize": 4}
            style = {"color": f"C{index}", "marker": "o", "capsize": 3, **shape}
            axes.errorbar(kib, means, yerr=errors, label=METHODS[method] if axes is panels[0, 0] else None, **style)
        count_along(axes)
        axes.set_title(title, fontsize=9)
        axes.tick_params(which="both", labelsize=8)
    for axes in panels[1]:
        axes.set_xlabel("KiB of the delta", fontsize=9)
    add_legend(figure, 3)
    return png_of(figure)


if __name__ == "__main__":
    main()
