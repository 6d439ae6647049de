"""Token classification through the command: every stage trains the same, and tags are learned."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification

import adapeft as library
from tests.support.checkpoints import COLOURS, FILLING, write_bert, write_lines
from tests.support.stages import check_stages, run_locally
from tests.support.through_peft import through_peft

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options for a small random encoder, and for sentences whose colours are entities of one or two words."""
    folder, rng = tmp_path_factory.mktemp("tags"), random.Random(0)
    words = [colour for group in COLOURS.values() for colour in group]

    def example():
        length = rng.choice([1, 2])
        before, after = (rng.choices(FILLING, k=rng.randint(1, 4)) for _ in range(2))
        tags = ["B-COL", "I-COL"][:length]
        return {
            "tokens": [*before, *rng.choices(words, k=length), *after],
            "ner_tags": [*["O"] * len(before), *tags, *["O"] * len(after)],
        }

    train, evaluation = (
        write_lines(folder / f"{name}.jsonl", [example() for _ in range(count)])
        for name, count in (("train", 160), ("validation", 41))
    )
    # Without dropout, whose masks differ between divisions of a batch.
    base = write_bert(folder / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = [f"model.name={base}", f"data.train={train}", f"data.evaluation={evaluation}", "data.max_length=16"]
    options += ["select.budget=20%", "select.calibration=160", "train.learning_rate=0.05", "train.batch_size=16"]
    return options


def run(options, folder, *overrides):
    """Run the ready config on a small model and small data."""
    return run_locally("deploy/configs/conll2003.yaml", folder, *options, *overrides)


def test_entities_are_learned_and_the_delta_reaches_peft(options, tmp_path):
    metrics = run(options, tmp_path / "run", "train.epochs=6")
    assert metrics["after"]["entity_f1"] > metrics["before"]["entity_f1"] + 0.3
    base, delta = Path(options[0].partition("=")[2]), tmp_path / "run" / "delta.safetensors"

    def make():
        torch.manual_seed(0)
        return AutoModelForTokenClassification.from_pretrained(base, num_labels=3).eval()

    applied = make()
    library.Delta.load(delta).apply(applied)
    loaded = through_peft(make(), delta, base, tmp_path / "peft", "TOKEN_CLS")
    ids = torch.arange(4, 16)[None]
    expected = applied(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(make()(input_ids=ids).logits, expected, atol=0.1)


def test_every_stage_trains_the_same(options, tmp_path):
    """Sentences differ in length, so workers that averaged means of their own words would train something else."""
    check_stages(partial(run, options), tmp_path, settings=((0, 1), (2, 2)), kept=0.95)
