"""Multiple choice through the command: every stage trains the same, and choices are learned."""

from __future__ import annotations

import random
from functools import partial

import pytest

import adapeft as library
from tests.support.checkpoints import COLOURS, FILLING, WITHOUT_DROPOUT, write_bert, write_lines
from tests.support.stages import check_stages, run_locally

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random encoder, and questions whose right choice is a word of red."""
    folder, rng = tmp_path_factory.mktemp("choices"), random.Random(0)
    write_bert(folder / "base", **WITHOUT_DROPOUT)

    def row():
        label = rng.randrange(4)
        others = COLOURS["green"] + COLOURS["blue"]
        choices = [rng.choice(COLOURS["red"] if number == label else others) for number in range(4)]
        words = [" ".join([*rng.choices(FILLING, k=rng.randint(0, 2)), choice]) for choice in choices]
        question = " ".join(rng.choices(FILLING, k=rng.randint(1, 5)))
        return {"startphrase": question, "label": label} | {f"ending{i}": word for i, word in enumerate(words)}

    for split, count in (("train", 160), ("validation", 41)):
        write_lines(folder / f"{split}.jsonl", [row() for _ in range(count)])
    return folder


def run(folder, output, *overrides):
    """Run the ready config on a small model and small data."""
    fixed = [f"model.name={folder / 'base'}", "data.max_length=16", "select.budget=20%", "select.calibration=64"]
    fixed += [f"data.train={folder / 'train.jsonl'}", f"data.evaluation={folder / 'validation.jsonl'}"]
    fixed += ["train.learning_rate=0.05"]
    return run_locally("deploy/configs/swag.yaml", output, *fixed, *overrides)


def test_choices_are_learned_and_the_delta_merges(folder, tmp_path):
    metrics = run(folder, tmp_path / "run", "train.epochs=6", "cluster.workers=1", "zero_stage=0")
    assert metrics["after"]["accuracy"] > max(0.8, metrics["before"]["accuracy"])
    delta = library.Delta.load(tmp_path / "run" / "delta.safetensors")
    library.merge(delta, str(folder / "base"), tmp_path / "merged")
    # A random draw: nothing promises a lower loss any more.
    again = ("train.max_steps=1", "cluster.workers=1", "zero_stage=0", "select.method=random")
    found = run(folder, tmp_path / "again", *again, f"model.name={tmp_path / 'merged'}")
    assert found["before"]["loss"] == pytest.approx(metrics["after"]["loss"], rel=1e-4)


def test_every_stage_trains_the_same(folder, tmp_path):
    check_stages(partial(run, folder), tmp_path)
