"""Answers that several ranks generate equal those of one plain process, at any ZeRO stage."""

from __future__ import annotations

import json

import pytest

from tests.support.questions import answers_alone, make_llama, make_prompts
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ranks_answer_as_one_plain_process(tmp_path, world_size):
    """Five prompts, two at a time: one rank has none in the last round."""
    run_on_ranks(world_size, "tests.on_ranks.answers", tmp_path)
    prompts = make_prompts()
    said = answers_alone(make_llama(), prompts)
    rows = zip(prompts.examples, prompts.texts, prompts.references, said, strict=True)
    expected = [dict(zip(("example", "prompt", "reference", "answer"), row, strict=True)) for row in rows]
    for rank in range(world_size):
        found = json.loads((tmp_path / f"answers-{rank}.json").read_text())
        assert found.keys() == {"training-0", "training-1", "training-2", "training-3", "inference-3"}
        for name, generations in found.items():
            assert generations == expected, name
