"""Sequence to sequence through the command: every stage trains the same, and the delta reaches PEFT."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import adapeft as library
from tests.support.checkpoints import FILLING, TELLING, WORDS, save_tokenizer, write_lines
from tests.support.stages import check_stages, run_locally
from tests.support.through_peft import through_peft

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

IDS = {"vocab_size": len(WORDS) + 4, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def make_t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**IDS, **sizes, decoder_start_token_id=0))


def make_bart():
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32) | {"d_model": 16, "dropout": 0.0}
    starts = {"decoder_start_token_id": 3, "forced_eos_token_id": None}
    return BartForConditionalGeneration(
        BartConfig(**IDS, **layers, **heads, **sizes, **starts, max_position_embeddings=32)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small random models, and pairs whose target is the only word of a colour in the source."""
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for name, make in (("t5", make_t5), ("bart", make_bart)):
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
        save_tokenizer(folder / name)

    def pair():
        word = rng.choice(TELLING)
        words = [*rng.choices(FILLING, k=rng.randint(1, 6)), word]
        rng.shuffle(words)
        return {"prompt": " ".join(words), "completion": " ".join([word] * rng.randint(1, 1 + (word in TELLING[:3])))}

    for split, count in (("train", 160), ("validation", 37)):
        write_lines(folder / f"{split}.jsonl", [pair() for _ in range(count)])
    return folder


def run(folder, name, output, *overrides):
    """Run the ready config on a small model and small data."""
    fixed = [f"model.name={folder / name}", "data.prefix=is ", "data.max_length=16", "data.max_target_length=8"]
    fixed += [f"data.train={folder / 'train.jsonl'}", f"data.evaluation={folder / 'validation.jsonl'}"]
    fixed += ["select.budget=30%", "select.calibration=64"]
    return run_locally("deploy/configs/nl2bash-t5.yaml", output, *fixed, *overrides)


def test_targets_are_learned_and_the_delta_reaches_peft(folder, tmp_path):
    options = ("train.learning_rate=0.02", "train.max_steps=200", "cluster.workers=1", "zero_stage=0")
    answers = ("data.generate=all", "data.max_new_tokens=8", "data.metric=rouge_l")
    metrics = run(folder, "t5", tmp_path / "run", *options, *answers)
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]
    assert metrics["after"]["rouge_l"] > metrics["before"]["rouge_l"] + 0.2
    delta = tmp_path / "run" / "delta.safetensors"
    applied, plain = (T5ForConditionalGeneration.from_pretrained(folder / "t5").eval() for _ in range(2))
    library.Delta.load(delta).apply(applied)
    loaded = through_peft(plain, delta, folder / "t5", tmp_path / "peft", "SEQ_2_SEQ_LM")
    asked = AutoTokenizer.from_pretrained(folder / "t5")("is the big rose", return_tensors="pt")
    inputs = {"input_ids": asked["input_ids"], "labels": torch.tensor([[2, 4, 3]])}
    torch.testing.assert_close(loaded(**inputs).logits, applied(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_every_stage_trains_the_same(folder, tmp_path, name):
    """Targets differ in length, so workers that averaged means of their own tokens would train something else."""
    options = ("train.learning_rate=0.01", "select.groups=element", "data.generate=9", "data.max_new_tokens=6")
    check_stages(partial(run, folder, name), tmp_path, *options, same=["rouge_l"])
