"""Tests that run the examples of deploy/examples on tiny random models."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adapeft
from tests.support.chats import make_tokenizer

ROOT = Path(__file__).parents[2]


def run(example: str, *arguments: Path | str, launcher: Sequence[str] = ()) -> str:
    """Run an example in a process of its own, offline, and return what it prints.

    Args:
        launcher: module and options that start the example instead of Python.
    """
    offline = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}  # HF_DATASETS_CACHE is that of the tests
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *launcher, str(ROOT / "deploy" / "examples" / example), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers(printed: str, name: str) -> list[float]:
    """Return the numbers in the line that begins with ``name``."""
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{name} "))
    return [float(value) for value in line.split()[1:]]


def write(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    """The reference of both is the base, which the policy is at the start."""
    pairs = [{"prompt": f"{n} and {n}", "chosen": " yes", "rejected": " no"} for n in range(16)]
    files = make_model(tmp_path / "model"), write(tmp_path / "pairs.jsonl", pairs)
    found = {}
    for reference in ("start", "disk"):
        out = tmp_path / f"{reference}.safetensors"
        found[reference] = numbers(run("dpo.py", "--reference", reference, *files, out), "losses")
        assert found[reference][-1] < 0.693, "log 2: the preferred answers are no likelier than at the start"
        assert adapeft.Delta.load(out).changes
    assert found["disk"] == pytest.approx(found["start"], rel=1e-4)


@pytest.mark.slow
def test_sft(tmp_path):
    pairs = [{"prompt": f"{n} and {n}", "completion": "aaaa"} for n in range(16)]
    out = tmp_path / "delta.safetensors"
    printed = run("sft.py", make_model(tmp_path / "model"), write(tmp_path / "pairs.jsonl", pairs), out)
    losses = numbers(printed, "losses")
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    (generated,) = (line for line in printed.splitlines() if line.startswith("generated "))
    assert generated.startswith("generated aaaa"), "ten steps teach a letter, not when to stop"
    assert adapeft.Delta.load(out).changes


@pytest.mark.slow
def test_grpo(tmp_path):
    questions = [{"prompt": f"{n}{n}", "answer": "a"} for n in range(4)]
    out = tmp_path / "delta.safetensors"
    printed = run("grpo.py", make_model(tmp_path / "model"), write(tmp_path / "questions.jsonl", questions), out)
    rewards = numbers(printed, "rewards")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert 0 < adapeft.Delta.load(out).count <= 1000


def trainer_flags(folder: Path) -> list[str]:
    """Return the flags of trainer.py for a small task in ``folder``, which has to be empty."""
    rows = [{"text": f"{n} is {'odd' if n % 2 else 'even'}", "label": "odd" if n % 2 else "even"} for n in range(64)]
    flags = {
        "model": make_model(folder / "model"),
        "train_file": write(folder / "train.jsonl", rows),
        "validation_file": write(folder / "validation.jsonl", rows[:16]),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "eval_strategy": "epoch",
        "report_to": "none",
        "use_cpu": "true",
    }
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.slow
def test_the_trainer_resumes(tmp_path):
    """With the best checkpoint at the end; every epoch is better than the one before."""
    out = tmp_path / "out"
    command = "trainer.py", *trainer_flags(tmp_path), "--save_strategy=epoch", "--load_best_model_at_end"
    before, after = numbers(run(*command, f"--output_dir={out}"), "losses")
    assert after < before
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert len(checkpoints) == 3
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(after, rel=1e-6)
    shutil.rmtree(checkpoints[-1])  # as if it had been interrupted in the last epoch
    first = adapeft.Delta.load(out / "delta.safetensors")
    assert numbers(run(*command, f"--output_dir={out}"), "losses")[1] == after
    again = adapeft.Delta.load(out / "delta.safetensors")
    assert all(torch.equal(again.changes[name].values, change.values) for name, change in first.changes.items())


@pytest.mark.slow
def test_flags_of_the_trainer(tmp_path, monkeypatch, capsys):
    """In one process, because importing takes longer than training.

    Without clipping: for a classifier the Trainer's gradients grow with the number of accumulated batches, which Adam
    alone does not notice.
    """
    flags = [*trainer_flags(tmp_path), "--max_grad_norm=0"]

    def losses(name: str, *options: str) -> list[float]:
        out = tmp_path / name
        monkeypatch.setattr("sys.argv", ["trainer.py", *flags, f"--output_dir={out}", "--save_strategy=no", *options])
        runpy.run_path(str(ROOT / "deploy" / "examples" / "trainer.py"), run_name="__main__")
        assert adapeft.Delta.load(out / "delta.safetensors").changes
        return numbers(capsys.readouterr().out, "losses")

    plain = losses("plain")
    for name, options in SAME.items():
        assert losses(name, *options) == pytest.approx(plain, rel=1e-4), name
    for name, options in OTHERS.items():
        for groups in ("row", "element", "tensor"):
            before, after = losses(f"{name}-{groups}", *options, f"--groups={groups}", "--budget=5%")
            assert after < 0.9 * before, (name, groups)


SAME = {
    "reentrant": ("--gradient_checkpointing", '--gradient_checkpointing_kwargs={"use_reentrant": true}'),
    "not-reentrant": ("--gradient_checkpointing", '--gradient_checkpointing_kwargs={"use_reentrant": false}'),
    "accumulation": ("--per_device_train_batch_size=4", "--gradient_accumulation_steps=4"),
    "compiled": ("--torch_compile",),
}
"""Flags that change no loss."""
OTHERS = {
    "bf16": ("--bf16",),
    "label-smoothing": ("--label_smoothing_factor=0.1",),
    "adafactor": ("--optim=adafactor",),
    "neftune": ("--neftune_noise_alpha=5",),
}
"""Flags that change the losses."""


@pytest.mark.slow
def test_copied_compiled_and_merged_models_compute_what_the_attached_one_does(tmp_path):
    texts = write(tmp_path / "texts.jsonl", [{"text": f"{n} and {n}"} for n in range(32)])
    printed = run("inference.py", make_model(tmp_path / "model"), texts, tmp_path / "merged")
    lines = [line.split(maxsplit=2) for line in printed.splitlines()]
    differences = {words[1]: float(words[2]) for words in lines if words[0] == "difference"}
    assert differences.pop("base") > 0.1, "training has changed nothing"
    assert set(differences) == {"attached", "copied", "compiled", "merged"}
    assert max(differences.values()) < 1e-5
    generated = {words[1]: words[2] for words in lines if words[0] == "generated"}
    assert set(generated) == set(differences)
    assert len(set(generated.values())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--cpu", "--num_processes", "1"], id="plain"),
        pytest.param(["--cpu", "--num_processes", "2"], id="two-processes", marks=pytest.mark.ranks),
        pytest.param(
            ["--use_deepspeed", "--zero_stage", "2", "--num_processes", "1"], id="zero2", marks=pytest.mark.ranks
        ),
    ],
)
def test_a_plain_loop_with_accelerate(options, tmp_path):
    texts = write(tmp_path / "texts.jsonl", [{"text": f"{n} and {n}"} for n in range(32)])
    model, out = make_model(tmp_path / "model"), tmp_path / "delta.safetensors"
    launcher = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", *options]
    losses = numbers(run("accelerate_loop.py", model, texts, out, launcher=launcher), "losses")
    assert losses[-1] < losses[0]
    first = adapeft.Delta.load(out)
    assert first.changes

    # Value, both moments and a master weight of each trained element, next to names; the base has 151 kB.
    states = sorted(tmp_path.glob("delta.safetensors.states/epoch-*"))
    assert len(states) == 3
    for state in states:
        files = [path for path in state.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt")]
        assert 12 * first.count < sum(path.stat().st_size for path in files) <= 16 * first.count + 10_000

    shutil.rmtree(states[-1])  # as if it had been interrupted in the last epoch
    resumed = numbers(run("accelerate_loop.py", model, texts, out, launcher=launcher), "losses")
    assert resumed == losses[-len(resumed) :]
    again = adapeft.Delta.load(out)
    assert all(torch.equal(again.changes[name].values, change.values) for name, change in first.changes.items())
