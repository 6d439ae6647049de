"""Tests that run the examples of deploy/examples on tiny random models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adapeft
from tests.support.chats import make_tokenizer

ROOT = Path(__file__).parents[2]


def run(example: str, *arguments: Path) -> str:
    """Run an example in a process of its own, offline, and return what it prints."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(arguments[-1].parent / "cache")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "deploy" / "examples" / example), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_model(folder: Path) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_dpo(tmp_path):
    pairs = [{"prompt": f"{n} and {n}", "chosen": " yes", "rejected": " no"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    out = tmp_path / "delta.safetensors"
    printed = run("dpo.py", make_model(tmp_path / "model"), tmp_path / "pairs.jsonl", out)
    losses = [float(value) for value in printed.split("losses", 1)[1].split()]
    assert losses[-1] < 0.693, "log 2: the preferred answers are no likelier than at the start"
    assert adapeft.Delta.load(out).changes


@pytest.mark.slow
def test_sft(tmp_path):
    pairs = [{"prompt": f"{n} and {n}", "completion": " yes"} for n in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    out = tmp_path / "delta.safetensors"
    printed = run("sft.py", make_model(tmp_path / "model"), tmp_path / "pairs.jsonl", out)
    losses = [float(value) for value in printed.split("losses", 1)[1].split()]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert adapeft.Delta.load(out).changes
