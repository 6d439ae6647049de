"""Deltas are exactly sparse, revert exactly, are small on disk, and are rejected on another model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapeft import AdapeftError, Delta, attach, delta
from adapeft.parts.elements import Elements
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.oracles.leaves import SUBSETS, changed, inside, logits, make_subset, train, trained_delta, weights
from tests.support.tiny import make_bert, make_gpt2

MODELS = {"bert": make_bert, "gpt2": make_gpt2}


@pytest.mark.parametrize("kind", SUBSETS)
@pytest.mark.parametrize("name", MODELS)
def test_training_with_weight_decay_changes_the_subset_alone(name, kind):
    found, attached = trained_delta(MODELS[name], kind)
    base = MODELS[name]()
    subset, before = make_subset(base, kind), weights(base)
    found.apply(base)
    masks = changed(before, weights(base))
    for parameter, mask in masks.items():
        if parameter not in subset.new:
            allowed = inside(subset.parts.get(parameter), mask.shape)
            assert not (mask & ~allowed).any(), f"{parameter} moved outside of the subset"
    count = sum(int(mask.sum()) for parameter, mask in masks.items() if parameter not in subset.new)
    # Entries of tokens and positions that do not occur get no gradient; the others move.
    assert 0.5 * subset.count < count <= subset.count == found.count
    assert all(torch.equal(found.new[name], attached.get_parameter(name)) for name in subset.new)
    torch.testing.assert_close(logits(base), logits(attached), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SUBSETS)
def test_a_saved_delta_is_the_same_delta(kind, tmp_path):
    found, _ = trained_delta(make_bert, kind, method="random", scores={"accuracy": 0.5})
    found.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert loaded.fingerprint == found.fingerprint
    assert {name: loaded.description[name] for name in found.description} == found.description
    assert loaded.count == found.count
    assert loaded.changes.keys() == found.changes.keys()
    for name, change in found.changes.items():
        other = loaded.changes[name]
        assert torch.equal(other.values, change.values)
        assert other.part == change.part
    assert all(torch.equal(loaded.new[name], value) for name, value in found.new.items())


@pytest.mark.parametrize(("kind", "bytes_per_element"), [("element", 8), ("row", 4.5), ("tensor", 4)])
def test_size_on_disk(kind, bytes_per_element, tmp_path):
    shape = (1000, 100)
    part = {
        "element": Elements(shape, torch.arange(0, 100_000, 2)),
        "row": Rows(shape, torch.arange(0, 1000, 2)),
        "tensor": Whole(shape),
    }[kind]
    model = torch.nn.Module()
    model.w = torch.nn.Linear(100, 1000, bias=False)
    attach(model, Subset({"w.weight": part}))
    delta(model).save(tmp_path / "d")
    assert (tmp_path / "d").stat().st_size <= bytes_per_element * part.count + 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SUBSETS)
def test_reverting_is_bit_identical(kind, dtype):
    found, attached = trained_delta(lambda: make_bert().to(dtype), kind)
    base = make_bert().to(dtype)
    before = weights(base)
    applied = found.apply(base)
    assert sum(int(mask.sum()) for mask in changed(before, weights(base)).values()) > 0
    torch.testing.assert_close(logits(base), logits(attached), rtol=2e-2, atol=3e-2)
    applied.revert()
    assert not any(mask.any() for mask in changed(before, weights(base)).values())
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(1)
    later = weights(base)
    applied.revert()
    assert not any(mask.any() for mask in changed(later, weights(base)).values()), "the second time does nothing"


def test_a_delta_is_a_copy_that_further_training_does_not_change():
    model = make_bert()
    attach(model, make_subset(model, "mixed"))
    train(model)
    found = delta(model)
    values = {name: change.values.clone() for name, change in found.changes.items()}
    head = found.new["classifier.weight"].clone()
    train(model)
    assert all(torch.equal(found.changes[name].values, value) for name, value in values.items())
    assert torch.equal(found.new["classifier.weight"], head)


def test_a_tied_weight_changes_in_both_places():
    part = Rows((29, 12), torch.tensor([2, 9]))
    model = attach(make_gpt2(), Subset({"transformer.wte.weight": part}))
    train(model)
    base = make_gpt2()
    delta(model).apply(base)
    assert base.lm_head.weight is base.transformer.wte.weight
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)


def test_another_base_is_refused_and_left_alone(gpt2):
    found, _ = trained_delta(make_bert)
    with pytest.raises(AdapeftError, match="this model has nothing there"):
        found.apply(gpt2)
    other = make_bert()
    with torch.no_grad():
        other.bert.pooler.dense.bias.add_(0.5)
    before = weights(other)
    with pytest.raises(AdapeftError, match="belongs to a base model of fingerprint"):
        found.apply(other)
    assert not any(mask.any() for mask in changed(before, weights(other)).values())
    with pytest.raises(AdapeftError, match=r"'classifier.weight' of shape \(4, 12\); this model has \(3, 12\)"):
        Delta({}, {"classifier.weight": torch.zeros(4, 12)}, found.fingerprint).apply(make_bert())


def test_without_attach_there_is_no_delta(bert):
    with pytest.raises(AdapeftError, match="no subset is attached"):
        delta(bert)


def _edit(path: Path, tensors: Callable[[dict], object] = id, header: Callable[[dict], object] = id) -> None:
    """Rewrite a delta file after editing its tensors or description."""
    content = load_file(path)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["adapeft"])
    tensors(content)
    header(description)
    save_file(content, path, metadata={"adapeft": json.dumps(description)})


ELEMENTS = "bert.embeddings.LayerNorm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"tensors": lambda t: t.pop(f"{ELEMENTS}.values")}, "damaged description"),
        ({"tensors": lambda t: t.update({f"{ELEMENTS}.values": torch.zeros(7)})}, "values of shape"),
        ({"tensors": lambda t: t.update({f"{ELEMENTS}.indices": torch.tensor([12])})}, "ascending and from 0 to 11"),
        ({"tensors": lambda t: t.update({f"{ELEMENTS}.indices": torch.tensor([-1])})}, "ascending and from 0 to"),
        ({"tensors": lambda t: t.pop(f"{ELEMENTS}.indices")}, "does not match its indices"),
        ({"tensors": lambda t: t.pop("classifier.bias.new")}, "damaged description"),
        ({"header": lambda h: h.pop("parts")}, "damaged description"),
        ({"header": lambda h: h.update(parts=[1])}, "damaged description"),
        ({"header": lambda h: h.pop("fingerprint")}, "damaged description"),
        ({"header": lambda h: h["parts"][ELEMENTS].update(kind="rows", dim=5)}, "damaged description"),
        ({"header": lambda h: h["parts"][ELEMENTS].update(kind="columns")}, "has kind 'columns'"),
        ({"header": lambda h: h.update(kind="subset")}, "another kind of artifact"),
    ],
)
def test_damaged_files_are_refused(damage, message, tmp_path):
    path = tmp_path / "delta.safetensors"
    trained_delta(make_bert, "element")[0].save(path)
    _edit(path, **damage)
    with pytest.raises(AdapeftError, match=message):
        Delta.load(path)


def test_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "delta.safetensors"
    trained_delta(make_bert, "element")[0].save(path)
    content = path.read_bytes()
    for kept in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(AdapeftError, match="is not a delta, or it is truncated"):
            Delta.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(AdapeftError, match="not one of adapeft's"):
        Delta.load(path)
    make_subset(make_bert(), "row").save(path)
    with pytest.raises(AdapeftError, match="another kind of artifact"):
        Delta.load(path)
    with pytest.raises(AdapeftError, match="no such file"):
        Delta.load(tmp_path / "missing")
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_a_description_does_not_overwrite_what_the_delta_is(tmp_path):
    found, _ = trained_delta(make_bert, "element", kind="mine", parts="mine", new="mine", fingerprint="mine")
    found.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert loaded.count == found.count
    assert loaded.fingerprint == found.fingerprint
