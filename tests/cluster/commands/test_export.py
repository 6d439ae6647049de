"""The commands ``export`` and ``import``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapeft import Delta
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from tests.oracles.merged import random_delta, save_base
from tests.oracles.parts import make_llama
from tests.support.checkpoints import WORDS, adapeft, save_tokenizer, write_config, write_text
from tests.support.tiny import make_bert

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
KEY = QUERY.replace("query", "key")
ROWS = Rows((12, 12), torch.tensor([3]))
LORA = Lora((12, 12), 0, 2, 4.0)


@pytest.fixture
def files(tmp_path):
    """Return a folder with a base, a LoRA delta, a delta of LoRA and elements, a subset and a foreign file."""
    save_base(make_bert(), tmp_path / "base")
    random_delta(make_bert(), {QUERY: LORA}).save(tmp_path / "lora.safetensors")
    elements = Elements((12, 12), torch.tensor([3]))
    random_delta(make_bert(), {QUERY: LORA, KEY: elements}).save(tmp_path / "both.safetensors")
    Subset({QUERY: ROWS}).save(tmp_path / "subset.safetensors")
    save_file({QUERY: torch.zeros(2)}, tmp_path / "foreign.safetensors")
    return tmp_path


def test_to_peft_and_back(command, files):
    status, output, _ = command("export", files / "lora.safetensors", "--to", "peft", "--model", files / "base",
                                "--out", files / "peft")  # fmt: skip
    assert (status, output.splitlines()[-1]) == (0, str(files / "peft"))
    arguments = ("import", files / "peft", "--model", files / "base", "--out", files / "back.safetensors")
    status, output, _ = command(*arguments)
    assert (status, output.splitlines()[-1]) == (0, str(files / "back.safetensors"))
    before, after = Delta.load(files / "lora.safetensors"), Delta.load(files / "back.safetensors")
    assert after.changes[QUERY].part == replace(LORA, alpha=2.0)
    ours, theirs = (LORA.split(found.changes[QUERY].values) for found in (before, after))
    assert torch.equal(theirs["lora_A"], ours["lora_A"])
    assert torch.equal(theirs["lora_B"], 2 * ours["lora_B"])  # the scaling is in B
    assert "exists already" in command(*arguments).stderr
    _, output, _ = command("show", files / "back.safetensors")
    assert "lora" in output
    assert (
        command("import", files / "peft", "--model", files / "base", "--out", files / "b", "--task", "x").returncode
        == 2
    )


def test_two_adapters_that_belong_together(command, files):
    status, output, errors = command("export", files / "both.safetensors", "--to", "peft", "--model", files / "base",
                                     "--out", files / "peft")  # fmt: skip
    assert status == 0
    assert {path.name for path in (files / "peft").iterdir()} == {"shira", "lora"}
    said = " ".join((output + errors).split())
    assert "PeftMixedModel" in said
    assert "the adapter has modules saved whole, single elements. PEFT loads them" in said


def test_plain_lora_needs_no_note(command, tmp_path):
    model = make_bert()
    model.config.architectures = ["BertForSequenceClassification"]
    model.save_pretrained(tmp_path / "base")
    random_delta(model, {QUERY: LORA}).save(tmp_path / "delta")
    done = command("export", tmp_path / "delta", "--to", "peft", "--model", tmp_path / "base", "--out", tmp_path / "a")
    assert done.returncode == 0
    assert "PEFT loads them" not in done.stdout + done.stderr


def test_to_a_list_of_patterns(command, files):
    status, _, _ = command("export", files / "subset.safetensors", "--to", "unfrozen-parameters", "--out", files / "u")
    assert status == 0
    assert yaml.safe_load((files / "u").read_text()) == {"unfrozen_parameters": [f"^{QUERY}$[3:4]"]}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lora", ("--to", "checkpoint"), "`adapeft merge` writes a plain checkpoint."),
        (
            "lora",
            ("--to", "pefd"),
            "--to pefd: unknown format. The formats are peft and unfrozen-parameters. Did you mean 'peft'?",
        ),
        ("lora", ("--to", "peft"), "--model: missing. A PEFT adapter is checked against its base"),
        ("lora", ("--to", "unfrozen-parameters"), f"'{QUERY}' is trained as lora"),
        ("subset", ("--to", "unfrozen-parameters", "--model", "x"), "--model: not used by unfrozen-parameters"),
        ("subset", ("--to", "unfrozen-parameters", "--model", ""), "--model: not used by unfrozen-parameters"),
        ("subset", ("--to", "unfrozen-parameters", "--revision", "x"), "--revision: not used by unfrozen-parameters"),
        ("subset", ("--to", "peft", "--model", "x"), "a subset, but a PEFT adapter holds trained values"),
        ("lora", ("--to", "unfrozen-parameters", "--servable"), "--servable: not used by unfrozen-parameters"),
        ("lora", ("--to", "peft", "--servable", "--model", "BASE"), "the LoRA loaders of vLLM and SGLang"),
        ("nothing", ("--to", "peft", "--model", "x"), "no such file; expected a subset or a delta"),
        ("foreign", ("--to", "peft", "--model", "x"), "neither a delta nor a subset"),
    ],
)
def test_what_is_refused(command, files, name, arguments, message):
    arguments = [files / "base" if word == "BASE" else word for word in arguments]
    status, _, errors = command("export", files / f"{name}.safetensors", *arguments, "--out", files / "out")
    assert status == 2
    assert message in errors
    assert not (files / "out").exists()


@pytest.mark.parametrize("arguments", [("show",), ("export", "--to", "peft", "--model", "x", "--out", "out")])
def test_a_delta_that_is_refused_is_called_a_delta(command, files, arguments):
    first, *rest = arguments
    path = files / "lora.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(
        {key: value / 0 if key.endswith("lora_B") else value for key, value in load_file(path).items()}, path, header
    )
    status, _, errors = command(first, path, *rest)
    assert status == 2
    assert "values that are not finite" in errors
    assert "neither" not in errors


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("method", ["adapeft", "lora"])
def test_a_run_for_servers_ends_in_an_adapter(method, tmp_path):
    model = make_llama()
    model.resize_token_embeddings(len(WORDS) + 4)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    text = write_text(tmp_path / "text.txt", 1500)
    config = write_config(tmp_path / "run.yaml", tmp_path / "base", text, text, task="causal-lm")
    same = [f"select.method={method}", "select.groups=auto", "select.calibration=32", "train.max_steps=4"]
    done = adapeft("run", config, *same, "select.servable=true", "cluster.workers=1", "cluster.launcher=local")
    assert done.returncode == 0, done.stderr
    delta, out = tmp_path / "run" / "delta.safetensors", tmp_path / "out"
    done = adapeft("export", delta, "--to", "peft", "--servable", "--model", tmp_path / "base", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "serve it with max-lora-rank" in " ".join((done.stdout + done.stderr).split())
    assert (out / "adapter_model.safetensors").is_file()
