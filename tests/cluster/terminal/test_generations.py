"""Generated answers on the terminal."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from adapeft.tasks.generation import Generation
from cluster.terminal.console import Terminal
from cluster.terminal.generations import show_generations


def shown(*arguments):
    output = StringIO()
    show_generations(Terminal(Console(file=output, width=400)), *arguments)
    return output.getvalue()


def test_some_answers_are_shown_in_one_line_each():
    before = [Generation(example, "asked\nfor", "it", "") for example in (2, 4, 6, 8)]
    after = [Generation(example, "asked\nfor", "it", f"that\t{example}\x1b[2J") for example in (2, 4, 6, 8)]
    said = shown(after, before)
    assert "example 2 " in said
    assert "prompt     asked for\nreference  it\nbefore     (empty)\nafter      that 2�[2J\n" in said
    assert "example 8" not in said
    assert "answer     that 2�[2J\n" in shown(after)
    assert shown([]) == ""


def test_of_long_texts_the_end_of_the_prompt_and_the_start_of_the_answer_are_shown():
    said = shown([Generation(0, "a" * 300 + "why?", "because" + "b" * 300, "so" + "c" * 300)])
    for line, ends in zip(said.splitlines()[1:], ("why?", "b …", "c …"), strict=True):
        assert line.endswith(ends)
        assert 240 < len(line) < 260
