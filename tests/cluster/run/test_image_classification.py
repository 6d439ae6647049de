"""Image classification through the command: every stage trains the same, and the delta reaches PEFT and merges."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import adapeft as library
from tests.support.checkpoints import adapeft, write_lines
from tests.support.pictures import COLOURS, write_pictures, write_vit
from tests.support.stages import check_stages
from tests.support.through_peft import through_peft

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random vision transformer, and pictures of colours, one of which is no image."""
    folder = tmp_path_factory.mktemp("pictures")
    write_vit(folder / "vit")
    for seed, (split, count) in enumerate((("train", 120), ("validation", 41))):
        rows = write_pictures(folder / split, count, seed)
        write_lines(folder / f"{split}.jsonl", rows)
    (folder / "train" / "17.png").write_text("no image")
    return folder


def run(folder, output, *overrides):
    """Run the ready config on a small model and small data."""
    fixed = [f"model.name={folder / 'vit'}", "select.budget=20%", "select.calibration=64", f"output={output}"]
    fixed += [f"data.train={folder / 'train.jsonl'}", f"data.evaluation={folder / 'validation.jsonl'}"]
    fixed += ["train.learning_rate=0.02", "cluster.launcher=local", "data.invalid=drop"]
    done = adapeft("run", "deploy/configs/beans.yaml", *fixed, *overrides)
    assert done.returncode == 0, done.stderr
    assert "1 of 120 examples dropped" in done.stderr + done.stdout
    return json.loads((output / "metrics.json").read_text())


def test_colours_are_learned_and_the_delta_reaches_peft(folder, tmp_path):
    where = ("cluster.workers=1", "zero_stage=0", "train.epochs=6")
    metrics = run(folder, tmp_path / "run", *where, "select.exclude=*embeddings*")
    assert metrics["after"]["accuracy"] > max(0.8, metrics["before"]["accuracy"])
    delta = tmp_path / "run" / "delta.safetensors"
    library.merge(library.Delta.load(delta), str(folder / "vit"), tmp_path / "merged")
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert tuple(merged.config.id2label.values()) == COLOURS
    plain = AutoModelForImageClassification.from_pretrained(folder / "vit", num_labels=3)
    loaded = through_peft(plain, delta, folder / "vit", tmp_path / "peft", None)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(pixel_values=pixels).logits, merged(pixels).logits, rtol=1e-5, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size["height"] == 8


def test_every_stage_trains_the_same(folder, tmp_path):
    check_stages(partial(run, folder), tmp_path)


def test_an_image_that_is_none_is_named_before_workers_start(folder, tmp_path):
    fixed = [f"model.name={folder / 'vit'}", f"output={tmp_path}", "cluster.launcher=local"]
    fixed += [f"data.train={folder / 'train.jsonl'}", f"data.evaluation={folder / 'validation.jsonl'}"]
    done = adapeft("run", "deploy/configs/beans.yaml", *fixed)
    assert done.returncode == 2
    said = "data.train: row 17 (counted from 0): data.image = 'image' is not an image"
    assert said in " ".join(done.stderr.split())
