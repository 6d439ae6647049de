"""The page of a report: one HTML file that refers to nothing outside itself."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from adapeft.tasks.generation import Generation
from cluster.output.pictures.picture import Picture

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --line: #d5d8dc; --dim: #5b6168; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181c; --text: #e4e6e9; --line: #3a3f46; --dim: #a3a9b1; }
}
* { box-sizing: border-box; }
body {
  background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  max-width: 800px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere;
}
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 8px; padding: 6px; }
figcaption { color: var(--dim); font-size: .9em; margin-top: .4em; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 4px 8px 4px 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.pairs th { width: 35%; }
.wide { overflow-x: auto; font-size: .85em; overflow-wrap: normal; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .9em; }
"""
_LONGEST = 1000
"""Characters of a generated text that are shown."""


def page_of(title: str, blocks: Iterable[str]) -> str:
    """Return the HTML of a page with a heading and these blocks of HTML."""
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            # Browsers otherwise ask the server for /favicon.ico.
            f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>',
            f"<body><h1>{escape(title)}</h1>",
            *blocks,
            "</body></html>\n",
        )
    )


def figure(picture: Picture) -> str:
    """Return a picture with its title and caption."""
    image = b64encode(picture.png).decode("ascii")
    return (
        f'<h2>{escape(picture.title)}</h2>\n<figure id="{escape(picture.name)}">'
        f'<img alt="{escape(picture.caption)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def pairs(rows: Mapping[str, str]) -> str:
    """Return a table of names and values."""
    lines = (f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows.items())
    return "\n".join(('<table class="pairs">', *lines, "</table>"))


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a heading for each column, which scrolls by itself where the screen is too narrow."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return "\n".join(
        (f'<div class="wide"><table><tr>{head}</tr>', *(f"<tr>{line}</tr>" for line in lines), "</table></div>")
    )


def paragraphs(texts: Iterable[str]) -> str:
    return "\n".join(f"<p>{escape(text)}</p>" for text in texts)


def answers(generations: Sequence[Generation], before: Sequence[Generation]) -> str:
    """Return generated answers next to those of the data; nothing if there are none.

    Args:
        generations: answers after training to show.
        before: answers before training; those to other examples are ignored.
    """
    if not generations:
        return ""
    earlier = {one.example: one.answer for one in before}
    lines = ["<h2>Generated answers</h2>"]
    for one in generations:
        texts = {"prompt": one.prompt[-_LONGEST:], "reference": one.reference[:_LONGEST]}
        if one.example in earlier:
            texts["answer before"] = earlier[one.example][:_LONGEST]
        texts["answer after"] = one.answer[:_LONGEST]
        cells = (
            f'<tr><th scope="row">{name}</th><td><pre>{escape(text) or "(empty)"}</pre></td></tr>'
            for name, text in texts.items()
        )
        lines += [f"<h3>Evaluation example {one.example}</h3>", '<table class="pairs">', *cells, "</table>"]
    return "\n".join(lines)
