"""Swapping deltas on one model: each acts as if alone, and the base is restored bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adapeft.deltas.swap as swap
from adapeft import AdapeftError, Delta, Deltas
from adapeft.parts.whole import Whole
from tests.oracles.deltas import dense_of, drawn_delta
from tests.oracles.leaves import changed, logits, make_subset, weights
from tests.oracles.parts import MODELS, mixed_subset
from tests.support.tiny import make_bert


def same(before: dict, model: nn.Module) -> bool:
    after = weights(model)
    return before.keys() == after.keys() and not any(mask.any() for mask in changed(before, after).values())


def deltas_of(model: nn.Module) -> dict[str, Delta]:
    """Return a delta with all kinds of parts and two that overlap it, each with a head."""
    found = {"mixed": mixed_subset(model), "rows": make_subset(model, "row"), "elements": make_subset(model, "element")}
    return {name: drawn_delta(model, subset.parts, seed, head=True)
            for seed, (name, subset) in enumerate(found.items())}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_each_as_if_alone_and_the_base_exactly_back(name, dtype):
    def make() -> nn.Module:
        return MODELS[name]().to(dtype)

    model, deltas = make(), deltas_of(make())
    base, names = weights(model), list(vars(model))
    alone = {}
    for key, delta in deltas.items():
        other = make()
        delta.apply(other)
        alone[key] = (weights(other), logits(other))
    outputs = [output for _, output in alone.values()]
    assert all((output - logits(model)).abs().max() > 0.01 for output in outputs)
    with Deltas(model, deltas) as swapped:
        for key in ("mixed", "rows", "elements", "mixed", "mixed", None, "elements"):
            swapped.use(key)
            assert swapped.active == key
            assert same(base if key is None else alone[key][0], model)
            assert key is None or torch.equal(logits(model), alone[key][1])
    assert swapped.active is None
    assert same(base, model)
    assert list(vars(model)) == names


def test_sums_are_rounded_once_to_the_dtype_of_the_base():
    model = make_bert().bfloat16()
    deltas = deltas_of(model)
    base = weights(model)
    swapped = Deltas(model, deltas)
    for key, delta in deltas.items():
        swapped.use(key)
        for name, change in delta.changes.items():
            if change.part.kind not in ("adapter", "lora"):
                expected = (base[name].double() + dense_of(change)).float().bfloat16()
                assert torch.equal(model.get_parameter(name), expected), name


def test_the_base_is_back_after_an_error():
    model = make_bert()
    base = weights(model)
    swapped = Deltas(model, deltas_of(model))
    swapped.use("mixed")
    with pytest.raises(AdapeftError, match="no delta of that name"), swapped:
        swapped.use("nowhere")
    assert same(base, model)


def test_an_unknown_name_leaves_the_one_in_use():
    model = make_bert()
    swapped = Deltas(model, deltas_of(model))
    swapped.use("rows")
    before = weights(model)
    with pytest.raises(AdapeftError, match=r"use\('row'\): no delta of that name. Did you mean 'rows'"):
        swapped.use("row")
    assert swapped.active == "rows"
    assert same(before, model)


def test_another_base_is_refused_by_the_name_of_the_delta():
    model = make_bert()
    deltas = deltas_of(model)
    before = weights(model)
    foreign = Delta(deltas["rows"].changes, deltas["rows"].new, "f" * 64)
    with pytest.raises(AdapeftError, match="'foreign': the delta belongs to a base model of fingerprint ffffffffffff"):
        Deltas(model, {**deltas, "foreign": foreign})
    shaped = drawn_delta(model, {"bert.pooler.dense.bias": Whole((7,))}, 1, head=True)
    with pytest.raises(AdapeftError, match=r"'shaped': the delta changes 'bert.pooler.dense.bias' of shape \(7,\)"):
        Deltas(model, {"shaped": shaped})
    assert same(before, model)


def test_the_model_is_hashed_once(monkeypatch):
    calls = []
    real = swap.fingerprint_model
    monkeypatch.setattr(swap, "fingerprint_model", lambda *given: calls.append(given) or real(*given))
    monkeypatch.setattr("adapeft.deltas.delta.fingerprint_model", swap.fingerprint_model)
    model = make_bert()
    swapped = Deltas(model, deltas_of(model))
    for key in ("rows", "elements", None, "mixed"):
        swapped.use(key)
    assert len(calls) == 1


def test_only_what_the_delta_in_use_replaces_is_kept():
    model = make_bert()
    deltas = deltas_of(model)
    swapped = Deltas(model, {name: deltas[name] for name in ("rows", "elements")})
    for name in ("rows", "elements"):
        swapped.use(name)
        kept = sum(entries.numel() for _, _, entries in swapped._applied._changes)
        assert kept == deltas[name].count
