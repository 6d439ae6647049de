"""Masked language modeling through the command: every stage trains the same, and the delta reaches PEFT."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

import adapeft as library
from tests.support.checkpoints import WITHOUT_DROPOUT, WORDS, save_model
from tests.support.stages import check_stages, run_locally
from tests.support.through_peft import through_peft

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random encoder with an output layer for masked words, and a text whose words follow each other in order."""
    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    # Without dropout, whose masks differ between divisions of a batch.
    config = BertConfig(vocab_size=len(WORDS) + 5, max_position_embeddings=32, **sizes, **WITHOUT_DROPOUT)
    save_model(BertForMaskedLM(config), folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder / "base")
    (folder / "text.txt").write_text(f"{' '.join(WORDS)}\n" * 100)
    return folder


def run(base, output, *overrides):
    """Run the ready config on the small model and text."""
    data = [f"data.{split}={base / 'text.txt'}" for split in ("train", "evaluation")]
    fixed = [f"model.name={base / 'base'}", *data, "data.max_length=16", "select.budget=20%", "select.calibration=64"]
    fixed += ["train.learning_rate=0.03", "select.batch_size=16"]
    return run_locally("deploy/configs/wikitext2-masked.yaml", output, *fixed, *overrides)


def test_the_next_words_are_learned_and_the_delta_reaches_peft(base, tmp_path):
    # PEFT saves whole modules: the bias of the output layer belongs to a module that holds further ones.
    options = ("select.include=bert.encoder.*", "train.max_steps=250", "cluster.workers=1", "zero_stage=0")
    metrics = run(base, tmp_path / "run", *options)
    assert metrics["after"]["loss"] < 0.8 * metrics["before"]["loss"]
    assert metrics["after"]["perplexity"] == pytest.approx(math.exp(metrics["after"]["loss"]))
    delta = tmp_path / "run" / "delta.safetensors"
    applied = BertForMaskedLM.from_pretrained(base / "base").eval()
    library.Delta.load(delta).apply(applied)
    plain = BertForMaskedLM.from_pretrained(base / "base")
    loaded = through_peft(plain, delta, base / "base", tmp_path / "peft", None)
    ids = torch.arange(4, 16)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, applied(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_every_stage_trains_the_same(base, tmp_path):
    """Blocks have different numbers of masks, so means of each worker's own masks would train something else."""
    check_stages(partial(run, base), tmp_path)


def test_masks_of_training_change_with_the_epoch(base, tmp_path):
    """One batch holds all blocks, and the weights hardly change; the first epoch has the masks of the evaluation."""
    steps = ("train.batch_size=400", "train.epochs=3", "train.max_steps=null", "train.logging_steps=1")
    metrics = run(base, tmp_path, *steps, "train.learning_rate=1e-9", "cluster.workers=1")
    logged = EventAccumulator(str(tmp_path / "logs")).Reload().Scalars("train/loss")
    losses = [event.value for event in logged]
    assert losses[0] == pytest.approx(metrics["before"]["loss"], rel=1e-5)
    differences = [abs(one - other) for one, other in itertools.combinations(losses, 2)]
    assert len(differences) == 3
    assert min(differences) > 1e-3
