"""Instruction tuning through the command: every ZeRO stage trains the same, and answers are learned."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import adapeft as library
from tests.support.chats import make_tokenizer
from tests.support.checkpoints import adapeft, write_lines
from tests.support.through_peft import through_peft

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

ANSWERS = {"red": "stop", "green": "go", "blue": "wait"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of a small random Llama on conversations, some of them too long."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape)
    LlamaForCausalLM(base).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"messages": turns(colour)} for _ in range(20) for colour in ANSWERS]
    train = write_lines(folder / "train.jsonl", [*rows, {"messages": turns("red " * 60)}])
    evaluation = write_lines(folder / "evaluation.jsonl", rows[:7])
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{name: {folder / 'base'}, task: instruct}}\n"
        f"data: {{train: {train}, evaluation: {evaluation}, max_length: 96, too_long: drop}}\n"
        "select: {groups: row, budget: 20%, calibration: 16, batch_size: 4}\n"
        "train: {learning_rate: 0.03, batch_size: 8, max_steps: 120}\n"
        f"output: {folder / 'out'}\n"
    )
    return path


def turns(colour):
    answer = ANSWERS.get(colour, "stop")
    return [{"role": "user", "content": colour}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(("zero_stage", "workers"), [(2, 1), (3, 2)])
def test_packing_changes_no_result(config, tmp_path, zero_stage, workers):
    """Not even what is chosen; an update step amplifies differences of rounding."""
    options = (
        "train.max_steps=5",
        "train.micro_batch_size=4",
        f"zero_stage={zero_stage}",
        f"cluster.workers={workers}",
    )
    found = []
    for packing in ("true", "false"):
        _, metrics = run(config, tmp_path / packing, f"data.packing={packing}", *options)
        found.append((metrics, library.Subset.load(tmp_path / packing / "subset.safetensors")))
    (packed, chosen), (padded, other) = found
    assert chosen.parts.keys() == other.parts.keys()
    assert packed["choice"]["value"] == pytest.approx(padded["choice"]["value"], rel=1e-4)
    assert packed["before"]["loss"] == pytest.approx(padded["before"]["loss"], rel=1e-6)
    assert packed["after"]["loss"] == pytest.approx(padded["after"]["loss"], rel=1e-3)
    assert packed["after"]["loss"] < 0.9 * packed["before"]["loss"]


def test_a_state_space_model_is_not_packed(config, tmp_path):
    """Its state passes from one example to the next: the run ends before anything is measured."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    MambaForCausalLM(MambaConfig(**sizes, pad_token_id=tokenizer.pad_token_id)).save_pretrained(tmp_path / "base")
    options = ("data.packing=true", "cluster.launcher=local", f"output={tmp_path / 'run'}")
    done = adapeft("run", config, f"model.name={tmp_path / 'base'}", *options)
    assert done.returncode == 2
    assert "data.packing = true: MambaForCausalLM" in " ".join(done.stderr.split())


def test_answers_are_generated_before_and_after(config, tmp_path):
    """The answers of the workers, of ``evaluate``, and of PEFT with the exported delta are the same."""
    options = ("data.generate=all", "data.max_new_tokens=6", "data.metric=exact_match")
    done, metrics = run(config, tmp_path / "run", "zero_stage=3", "cluster.workers=2", "groups=tensor", *options)
    assert metrics["before"]["exact_match"] == 0 < metrics["before"]["loss"]
    assert metrics["after"]["exact_match"] == metrics["after"]["rouge_l"] == 1
    assert metrics["metric"] == "exact_match"
    assert "exact match 0 → 1, ROUGE-L" in done.stdout
    files = [tmp_path / "run" / f"{name}.jsonl" for name in ("generations_before", "generations")]
    before, after = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [row["answer"] for row in after] == [row["reference"] for row in after]
    assert [row["example"] for row in after] == list(range(7))
    assert all(one["answer"] != other["answer"] for one, other in zip(before, after, strict=True))

    settings = (f"output={tmp_path / 'run'}", "groups=tensor", "cluster.launcher=local", "cluster.workers=1", *options)
    said = adapeft("evaluate", config, *settings).stdout
    assert "exact_match 1.0000\n" in said
    assert f"reference  {after[0]['reference']}\nanswer     {after[0]['answer']}\n" in said
    said = adapeft("evaluate", config, "--base", *settings).stdout
    assert f"exact_match {metrics['before']['exact_match']:.4f}\n" in said

    base = config.parent / "base"
    delta = tmp_path / "run" / "delta.safetensors"
    plain = LlamaForCausalLM.from_pretrained(base)
    model = through_peft(plain, delta, base, tmp_path / "peft", "CAUSAL_LM")
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in after:
        asked = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**asked, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=4)
        new = ids[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == row["answer"]


def run(config, tmp_path, *overrides):
    done = adapeft("run", config, "cluster.launcher=local", f"output={tmp_path}", *overrides)
    assert done.returncode == 0, done.stderr
    return done, json.loads((tmp_path / "metrics.json").read_text())


def test_answers_are_learned(config, tmp_path):
    """The delta, on the base in a new process, answers as the conversations do; the longest one was dropped."""
    done, metrics = run(config, tmp_path)
    assert "1 of 61 examples dropped" in done.stderr + done.stdout
    assert metrics["after"]["loss"] < 0.1 < 1 < metrics["before"]["loss"]
    base = config.parent / "base"
    model, tokenizer = LlamaForCausalLM.from_pretrained(base).eval(), make_tokenizer()
    library.Delta.load(tmp_path / "delta.safetensors").apply(model)
    for colour, answer in ANSWERS.items():
        asked = tokenizer.apply_chat_template(
            turns(colour)[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        said = model.generate(**asked, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=4)
        assert tokenizer.decode(said[0, asked["input_ids"].shape[1] :]) == f"{answer}<|im_end|>"


def test_the_ready_config(config, tmp_path):
    """Pairs of texts in columns of other names, of which only the answers are trained."""
    rows = [{"prompt": colour, "completion": answer} for _ in range(20) for colour, answer in ANSWERS.items()]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    options = [f"model.name={config.parent / 'base'}", "model.dtype=float32", f"data.train={data}"]
    options += [f"data.evaluation={data}", "select.budget=20%", "select.calibration=16", "select.batch_size=4"]
    options += ["select.groups=element", "train.learning_rate=0.03", "train.max_steps=30"]
    _, metrics = run("deploy/configs/nl2bash.yaml", tmp_path / "run", *options)
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]


@pytest.mark.parametrize(("zero_stage", "workers"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_every_stage_trains_the_same(config, tmp_path, zero_stage, workers):
    """Answers differ in length, so workers that averaged means of their own tokens would train something else."""
    _, one = run(config, tmp_path / "one", "zero_stage=3", "train.max_steps=5")
    options = (f"zero_stage={zero_stage}", f"cluster.workers={workers}", "train.max_steps=5")
    _, other = run(config, tmp_path / "other", *options)
    assert other["before"]["loss"] == pytest.approx(one["before"]["loss"], rel=1e-5)
    assert other["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-3)
    assert other["after"]["loss"] < 0.9 * other["before"]["loss"]
