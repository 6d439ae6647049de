"""Tests that damaged checkpoints and PEFT adapters are refused by name and reach nothing outside their folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from adapeft import AdapeftError, Delta
from adapeft.deltas.base import open_base
from adapeft.formats.peft.adapter import read_adapter
from adapeft.formats.peft.reader import load_from_peft
from tests.oracles.merged import CLASSIFIER, save_base
from tests.support.damage import check, damaged_bytes, damaged_safetensors, damaged_trees, examples
from tests.support.tiny import make_bert

NAMED = "adapter|--model|LoRA"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Return a folder with a base of several shards and an adapter of it that uses everything that is imported."""
    folder, model = tmp_path_factory.mktemp("originals"), make_bert()
    save_base(model, folder / "base")
    patterns = {"rank_pattern": {r".*\.0\..*": 3}, "alpha_pattern": {"query": 5}}
    saved = {"modules_to_save": ["classifier"], "trainable_token_indices": {"word_embeddings": [1, 5]}}
    adapted = get_peft_model(
        model,
        LoraConfig(target_modules=["query", "dense"], r=2, **patterns, **saved),
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    adapted.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def folder(originals, tmp_path) -> Path:
    """Return copies to be damaged, next to a file that must be neither read nor written."""
    shutil.copytree(originals, tmp_path / "in")
    save_file({"stolen": torch.ones(3)}, tmp_path / "outside.safetensors")
    return tmp_path / "in"


def test_configs_of_adapters(folder):
    path = folder / "adapter" / "adapter_config.json"
    tree = json.loads(path.read_text())

    @examples(150)
    @given(st.one_of(damaged_bytes(path.read_bytes()), damaged_trees(tree).map(lambda tree: json.dumps(tree).encode())))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = check(lambda: read_adapter(path.parent), path, names="adapter")
        if found is not None:
            assert all(0 < layer.alpha < float("inf") for layer in found.layers.values())

    run()


def test_weights_of_adapters(folder):
    path = folder / "adapter" / "adapter_model.safetensors"

    @examples(100)
    @given(damaged_safetensors(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check(lambda: read_adapter(path.parent), path, names="adapter")

    run()


def test_adapters_on_their_base(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    assert load_from_peft(path.parent, str(folder / "base"), CLASSIFIER["task"]).count

    @examples(25)
    @given(damaged_safetensors(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = check(lambda: load_from_peft(path.parent, str(folder / "base"), CLASSIFIER["task"]), path, names=NAMED)
        assert found is None or isinstance(found, Delta)

    run()


def test_patterns_that_never_end(folder):
    """Matching a pattern of a few characters may take longer than the age of the universe."""
    path = folder / "adapter" / "adapter_config.json"
    tree = json.loads(path.read_text())
    for pattern in ("(.*)*!", "(a|[a-z.]+)+!", "(.*.*.*.*.*.*.*.*.*)!", "(.{1,9}){1,99}!", "a?" * 40 + "!"):
        path.write_text(json.dumps({**tree, "rank_pattern": {pattern: 3}}))
        assert check(lambda: read_adapter(path.parent), path, names="rank_pattern") is None


def test_shards(folder):
    path = sorted((folder / "base").glob("model-*.safetensors"))[1]

    @examples(60)
    @given(damaged_safetensors(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = check(lambda: read_whole(folder / "base"), path, names="base")
        assert found is None or isinstance(found, str)

    run()


def read_whole(base: Path) -> str:
    checkpoint = open_base(str(base), CLASSIFIER["task"], {"num_labels": 3}).checkpoint
    stored = checkpoint.stored()
    read = checkpoint.read(stored)
    assert all(isinstance(value, torch.Tensor) for value in read.values())
    return checkpoint.fingerprint(new=set(checkpoint.parameters()) - stored)


def test_indices_of_shards(folder):
    path = folder / "base" / SAFE_WEIGHTS_INDEX_NAME
    tree = json.loads(path.read_text())

    @examples(60)
    @given(st.one_of(damaged_bytes(path.read_bytes()), damaged_trees(tree).map(lambda tree: json.dumps(tree).encode())))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check(lambda: read_whole(folder / "base"), path, names="base")

    run()


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "../../outside.safetensors", "..", ".", "", "/etc/passwd", "x" * 5000, 7],
    ids=lambda name: str(name)[:30],
)
def test_shards_are_in_the_folder(folder, name):
    path = folder / "base" / SAFE_WEIGHTS_INDEX_NAME
    shutil.copy(folder.parent / "outside.safetensors", folder)
    tree = json.loads(path.read_text())
    tree["weight_map"]["bert.pooler.dense.bias"] = name
    path.write_text(json.dumps(tree))
    with pytest.raises(AdapeftError, match=rf"{SAFE_WEIGHTS_INDEX_NAME}"):
        open_base(str(folder / "base"), CLASSIFIER["task"], {})


def test_configs_of_bases(folder):
    path = folder / "base" / "config.json"
    tree = json.loads(path.read_text())

    @examples(60)
    @given(st.one_of(damaged_bytes(path.read_bytes()), damaged_trees(tree).map(lambda tree: json.dumps(tree).encode())))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        check(lambda: read_whole(folder / "base"), path, names="base")

    run()


def test_a_config_with_a_value_of_another_type(folder):
    path = folder / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_probs_dropout_prob": None}))
    with pytest.raises(
        AdapeftError, match=r"is not a model .*'attention_probs_dropout_prob'.*Give a folder with config.json"
    ):
        read_whole(folder / "base")


def test_a_base_runs_no_code(folder):
    """``auto_map`` names code in the folder, which is never run and causes no prompt."""
    path = folder / "base" / "config.json"
    tree = json.loads(path.read_text())
    ran = folder.parent / "ran"
    (folder / "base" / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nConfig = dict\n")
    for model_type in ("bert", "nobody-knows-this"):
        path.write_text(json.dumps({**tree, "model_type": model_type, "auto_map": {"AutoConfig": "evil.Config"}}))
        check(lambda: read_whole(folder / "base"), path, names="base")
    assert not ran.exists()


def test_what_is_whole_loads(folder):
    """The undamaged files load, so the refusals above are due to the damage."""
    assert read_whole(folder / "base")
    assert read_adapter(folder / "adapter").layers
