"""Damaged deltas load as deltas that can be applied and added, or raise an error that names the file."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from adapeft import AdapeftError, Delta, sum_of
from adapeft.deltas.base import base_of
from adapeft.parts.adapter import Adapter
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from tests.oracles.deltas import drawn_delta
from tests.oracles.leaves import changed, weights
from tests.oracles.merged import CLASSIFIER, save_base
from tests.support.damage import check, damaged_safetensors, damaged_trees, examples, with_description
from tests.support.tiny import make_bert

LAYER = "bert.encoder.layer.0"
PARTS = {
    f"{LAYER}.attention.self.query.weight": Rows((12, 12), torch.tensor([0, 5]), 1),
    f"{LAYER}.attention.self.key.weight": Elements((12, 12), torch.tensor([1, 7, 14])),
    f"{LAYER}.attention.self.value.weight": Lora((12, 12), 0, 2, 4.0),
    f"{LAYER}.attention.self.value.bias": Whole((12,)),
    f"{LAYER}.output.dense": Adapter((12,), 2),
}


@pytest.fixture
def path(tmp_path) -> Path:
    found = drawn_delta(make_bert(), PARTS, 0, head=True, model=CLASSIFIER, scores={"accuracy": 0.5}, method="adapeft")
    found.save(tmp_path / "in" / "damaged.safetensors")
    return tmp_path / "in" / "damaged.safetensors"


def test_deltas(path, tmp_path):
    before = weights(make_bert())

    @examples(250)
    @given(damaged_safetensors(path.read_bytes()))
    def run(content: bytes) -> None:
        path.write_bytes(content)
        found = check(lambda: Delta.load(path), path)
        if found is None:
            return
        assert 0 <= found.count <= len(content)
        for name, change in found.changes.items():
            change.part.check("again", name)
        model = make_bert()
        with contextlib.suppress(AdapeftError):
            found.apply(model).revert()
        assert not any(mask.any() for mask in changed(before, weights(model)).values())
        with contextlib.suppress(AdapeftError):
            sum_of({"a": found, "b": found}, [1.0, 0.5], heads="a")

    run()


def test_the_base_of_a_damaged_delta(path, tmp_path):
    """The model description of a delta is passed to transformers."""
    base, found = save_base(make_bert(), tmp_path / "base"), Delta.load(path)
    names = ("no", "yes", "perhaps")
    found.description["model"]["labels"] |= {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }

    @examples(60)
    @given(damaged_trees(found.description["model"]))
    def run(model: Any) -> None:
        content = with_description(path.read_bytes(), {"model": model})
        changed = path.with_name("changed.safetensors")
        changed.write_bytes(content)
        loaded = check(lambda: Delta.load(changed), changed)
        if loaded is not None:
            check(lambda: base_of(loaded, base), changed, names="--model|the delta")

    run()


@pytest.mark.parametrize("option", ["trust_remote_code", "code_revision", "cache_dir", "num_hidden_layers"])
def test_labels_are_labels_alone(path, option):
    found = Delta.load(path)
    found.description["model"]["labels"][option] = True
    with pytest.raises(AdapeftError, match=f"cannot be saved .*labels.{option}: Extra inputs"):
        found.save(path)
    path.write_bytes(with_description(path.read_bytes(), found.description))
    with pytest.raises(AdapeftError, match=f"damaged description of a delta .model.labels.{option}: Extra inputs"):
        Delta.load(path)
