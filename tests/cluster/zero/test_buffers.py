"""Buffers that training changes are equal on all ranks, in the delta and in the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import adapeft
from adapeft.config.load import load_config
from cluster.ranks.inputs import load_inputs
from tests.support.checkpoints import COLOURS, save_tokenizer, write_colours, write_config
from tests.support.normalized import make_normalized
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks

OVERRIDES = ["groups=row", "calibration=32", "max_steps=8", "train.batch_size=8", "save_steps=4", "eval_steps=4"]


def write_normalized(folder: Path) -> Path:
    model = make_normalized()
    model.config.id2label = dict(enumerate(sorted(COLOURS)))
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.slow
def test_scores_belong_to_the_delta_and_survive_a_stop(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_normalized(tmp_path / "base"), *write_colours(tmp_path))
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, f"output={undisturbed}")
    run_on_ranks(2, "tests.on_ranks.finetune", 5, config, *OVERRIDES, f"output={stopped}")
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, f"output={stopped}")
    results = [json.loads((folder / "result.json").read_text()) for folder in (undisturbed, stopped)]
    assert results[0]["history"] == results[1]["history"]
    deltas = [adapeft.Delta.load(folder / "delta.safetensors") for folder in (undisturbed, stopped)]
    assert {"norm.running_mean", "norm.running_var", "codebook.codes"} <= deltas[0].buffers.keys()
    for name, value in deltas[0].buffers.items():
        assert torch.equal(deltas[1].buffers[name], value)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    deltas[0].apply(model)
    evaluation = load_inputs(load_config(config, [*OVERRIDES, f"output={undisturbed}"])).evaluation
    batch = evaluation.collate(np.arange(len(evaluation)))
    with torch.no_grad():
        logits = model.eval()(**batch.inputs).logits
    loss = torch.nn.functional.cross_entropy(logits, batch.labels)
    assert float(loss) == pytest.approx(results[0]["after"]["loss"], rel=1e-5)
