"""Files of generated answers."""

from __future__ import annotations

import pytest

from adapeft.errors import AdapeftError
from adapeft.tasks.generation import Generation
from cluster.output.generations import load_generations, save_generations

GENERATIONS = [Generation(0, "one\ntwo\u2028", "ü", ""), Generation(4, "", '"', "three")]


def test_answers_are_one_line_each(tmp_path):
    path = tmp_path / "generations.jsonl"
    assert load_generations(path) == []
    save_generations(path, GENERATIONS)
    assert path.read_text(encoding="utf-8").count("\n") == 2
    assert load_generations(path) == GENERATIONS


@pytest.mark.parametrize("line", ["{", "[]", '{"example": 0, "prompt": "", "reference": "", "answer": 3}'])
def test_a_damaged_file_is_named(tmp_path, line):
    path = tmp_path / "generations.jsonl"
    path.write_text(line)
    with pytest.raises(AdapeftError, match=r"generations\.jsonl: damaged .*Remove it"):
        load_generations(path)
