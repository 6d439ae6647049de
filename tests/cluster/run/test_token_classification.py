"""Token classification through the command: every stage trains the same, and tags are learned."""

from __future__ import annotations

import json
import random
from functools import partial

import pytest

from tests.support.checkpoints import COLOURS, FILLING, adapeft, write_bert, write_config, write_lines
from tests.support.stages import check_stages

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on sentences whose colours are entities, of one or two words."""
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
    return write_config(folder / "run.yaml", base, train, evaluation, "token-classification")


def run(config, folder, *overrides):
    done = adapeft("run", config, "cluster.launcher=local", f"output={folder}", *overrides)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "metrics.json").read_text())


def test_entities_are_learned(config, tmp_path):
    metrics = run(config, tmp_path)
    assert metrics["after"]["entity_f1"] > metrics["before"]["entity_f1"] + 0.3


def test_every_stage_trains_the_same(config, tmp_path):
    """Sentences differ in length, so workers that averaged means of their own words would train something else."""
    check_stages(partial(run, config), tmp_path, settings=((0, 1), (2, 2)), kept=0.95)
