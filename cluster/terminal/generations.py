"""A few generated answers next to those of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapeft.tasks.generation import Generation
    from cluster.terminal.console import Terminal

_SHOWN = 3
_LONGEST = 240
"""Characters of a text that are shown."""


def show_generations(terminal: Terminal, generations: Sequence[Generation], before: Sequence[Generation] = ()) -> None:
    """Print the first answers, with those of the model before training if they are given."""
    answers_before = {one.example: one.answer for one in before}
    for one in generations[:_SHOWN]:
        terminal.console.rule(f"data.evaluation, example {one.example}", style="dim")
        answered = {"answer": _start(one.answer)}
        if one.example in answers_before:
            answered = {"before": _start(answers_before[one.example]), "after": answered["answer"]}
        terminal.pairs({"prompt": _end(one.prompt), "reference": _start(one.reference), **answered})


def _start(text: str) -> str:
    line = _line(text)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


def _end(text: str) -> str:
    """Return the end of a prompt, where the question is."""
    line = _line(text)
    return line if len(line) <= _LONGEST else f"… {line[-_LONGEST:]}"


def _line(text: str) -> str:
    """Return a text in one line; control characters, which could manipulate a terminal, are replaced."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split())) or "(empty)"
