"""Multi-label classification through the command: every stage trains the same, and labels are learned."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

import adapeft as library
from tests.support.checkpoints import COLOURS, FILLING, WITHOUT_DROPOUT, write_bert, write_lines
from tests.support.stages import check_stages, run_locally
from tests.support.through_peft import through_peft

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random encoder, and texts with words of any number of colours."""
    folder, rng = tmp_path_factory.mktemp("labels"), random.Random(0)
    write_bert(folder / "base", **WITHOUT_DROPOUT)

    def row():
        labels = [colour for colour in COLOURS if rng.random() < 0.5]
        words = [*rng.choices(FILLING, k=rng.randint(1, 5)), *(rng.choice(COLOURS[label]) for label in labels)]
        rng.shuffle(words)
        return {"text": " ".join(words), "labels": labels}

    for split, count in (("train", 160), ("validation", 41)):
        write_lines(folder / f"{split}.jsonl", [row() for _ in range(count)])
    return folder


def run(folder, output, *overrides):
    """Run the ready config on a small model and small data."""
    fixed = [f"model.name={folder / 'base'}", "data.max_length=16", "select.budget=20%", "select.calibration=64"]
    fixed += [f"data.train={folder / 'train.jsonl'}", f"data.evaluation={folder / 'validation.jsonl'}"]
    fixed += ["train.learning_rate=0.05", "train.batch_size=16"]
    return run_locally("deploy/configs/go-emotions.yaml", output, *fixed, *overrides)


def test_labels_are_learned_and_the_delta_reaches_peft(folder, tmp_path):
    metrics = run(folder, tmp_path / "run", "train.epochs=6", "cluster.workers=1", "zero_stage=0")
    assert metrics["after"]["micro_f1"] > metrics["before"]["micro_f1"] + 0.2
    base, delta = folder / "base", tmp_path / "run" / "delta.safetensors"

    def make():
        torch.manual_seed(0)
        kind = {"num_labels": 3, "problem_type": "multi_label_classification"}
        return AutoModelForSequenceClassification.from_pretrained(base, **kind).eval()

    applied = make()
    library.Delta.load(delta).apply(applied)
    loaded = through_peft(make(), delta, base, tmp_path / "peft", "SEQ_CLS")
    ids, labels = torch.arange(4, 16)[None], torch.tensor([[1.0, 0.0, 1.0]])
    expected, found = (model(input_ids=ids, labels=labels) for model in (applied, loaded))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, F.binary_cross_entropy_with_logits(expected.logits, labels))
    assert not torch.allclose(make()(input_ids=ids).logits, expected.logits, atol=0.1)

    library.merge(library.Delta.load(delta), str(base), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.problem_type == "multi_label_classification"
    assert sorted(merged.config.id2label.values()) == sorted(COLOURS)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_every_stage_trains_the_same(folder, tmp_path):
    """Five steps at this rate find more labels, but do not yet lower the loss."""
    check_stages(partial(run, folder), tmp_path, settings=((0, 1),), kept=1.02, same=["micro_f1"])
