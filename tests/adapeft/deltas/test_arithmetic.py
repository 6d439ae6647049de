"""Sums of deltas equal dense float64 sums, take the smallest form, and are rejected where no sum exists."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement

import pytest
import torch
from torch import Tensor, nn

from adapeft import AdapeftError, Delta, difference, interpolation, scaled, sum_of
from adapeft.parts.adapter import Adapter
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from tests.oracles.deltas import dense_of, drawn_delta
from tests.oracles.leaves import logits, weights
from tests.oracles.parts import mixed_subset
from tests.support.tiny import make_bert, make_gpt2

SHAPE = (12, 19)
NAME = "bert.encoder.layer.1.output.dense.weight"
LAYER = "bert.encoder.layer.1.output.dense"
PARTS = {
    "tensor": Whole(SHAPE),
    "rows": Rows(SHAPE, torch.tensor([1, 4, 7])),
    "columns": Rows(SHAPE, torch.tensor([0, 18]), 1),
    "elements": Elements(SHAPE, torch.tensor([0, 19, 20, 100, 227])),
    "lora": Lora(SHAPE, 0, 2, 3.0),
}


def of_parts(**parts: str) -> dict[str, Delta]:
    """Return deltas by the given names, each with one part of the same matrix."""
    model = make_bert()
    return {name: drawn_delta(model, {NAME: PARTS[kind]}, seed) for seed, (name, kind) in enumerate(parts.items())}


def expected_sum(deltas: dict[str, Delta], factors: list[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for factor, delta in zip(factors, deltas.values(), strict=True):
        for name, change in delta.changes.items():
            total[name] = total.get(name, 0) + factor * dense_of(change)
    return total


def check_applied(model: nn.Module, result: Delta, expected: dict[str, Tensor]) -> None:
    """Check that applying ``result`` adds the expected changes and moves no other weight."""
    before = weights(model)
    result.apply(model)
    for name, parameter in model.named_parameters():
        moved = (before[name].double() + expected.get(name, 0)).float()
        if name not in result.new:
            torch.testing.assert_close(parameter.detach(), moved, rtol=1e-6, atol=1e-6)


def smallest(dense: Tensor) -> int:
    """Return the bytes of float32 values and gaps of one byte in the smallest of elements, rows, columns and all."""
    mask = dense.float() != 0
    rows, columns = int(mask.any(1).sum()), int(mask.any(0).sum())
    return min(5 * int(mask.sum()), rows * (4 * 19 + 1), columns * (4 * 12 + 1), 4 * mask.numel())


@pytest.mark.parametrize(("first", "second"), combinations_with_replacement(PARTS, 2))
def test_two_parts_of_any_kind(first, second, tmp_path):
    deltas, factors = of_parts(a=first, b=second), [0.75, -1.5]
    result = sum_of(deltas, factors)
    expected = expected_sum(deltas, factors)
    change = result.changes[NAME]
    torch.testing.assert_close(dense_of(change), expected[NAME], rtol=1e-6, atol=1e-6)
    if first == second == "lora":
        assert (change.part.kind, change.part.rank) == ("lora", 4)
    elif "lora" in (first, second):
        assert change.part.kind == "tensor"
    else:
        assert 4 * change.values.numel() + change.part.num_indices == smallest(expected[NAME])
    result.save(tmp_path / "sum.safetensors")
    check_applied(make_bert(), Delta.load(tmp_path / "sum.safetensors"), expected)


def test_the_form_is_the_smallest_that_holds_the_sum():
    few, many = torch.arange(0, 228, 50), torch.arange(19 * 3, 19 * 6)
    for parts, kind, dim in (
        ([Elements(SHAPE, few), Elements(SHAPE, few + 1)], "elements", 0),
        ([Elements(SHAPE, many), Elements(SHAPE, many[:5])], "rows", 0),
        ([Rows(SHAPE, torch.tensor([3]), 1), Elements(SHAPE, torch.tensor([3]))], "rows", 1),
        ([PARTS["rows"], Rows(SHAPE, torch.tensor([2, 3, 5, 6, 8, 9, 10, 11, 0]))], "tensor", 0),
    ):
        deltas = {str(seed): drawn_delta(make_bert(), {NAME: part}, seed) for seed, part in enumerate(parts)}
        result = sum_of(deltas, [1, 1])
        said = result.changes[NAME].part.describe()
        assert (said["kind"], said["dim"]) == (kind, dim)
        check_applied(make_bert(), result, expected_sum(deltas, [1, 1]))


def test_low_rank_stays_so_while_that_is_smaller():
    deltas = of_parts(a="lora", b="lora", c="lora", d="lora")
    ranks = {}
    for count in (2, 3, 4):
        some = dict(list(deltas.items())[:count])
        result = sum_of(some, [0.5] * count)
        ranks[count] = getattr(result.changes[NAME].part, "rank", 0)
        check_applied(make_bert(), result, expected_sum(some, [0.5] * count))
    assert ranks == {2: 4, 3: 6, 4: 0}, "rank 8 would take 8 · 31 numbers, the matrix has 228"


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_whole_models_of_mixed_parts(make):
    parts = mixed_subset(make(), adapters=False).parts
    shifted = dict(zip(parts, list(parts.values())[1:] + list(parts.values())[:1], strict=True))
    fitting = {name: part for name, part in shifted.items() if part.shape == parts[name].shape}
    assert len(fitting) > 2
    deltas = {"a": drawn_delta(make(), parts, 1), "b": drawn_delta(make(), fitting, 2)}
    check_applied(make(), interpolation(deltas, [0.3, 0.7]), expected_sum(deltas, [0.3, 0.7]))


def test_scale_and_difference():
    deltas = of_parts(a="rows", b="elements")
    for kind in PARTS:
        (one,) = of_parts(a=kind).values()
        doubled = scaled(one, -2)
        assert doubled.changes[NAME].part is one.changes[NAME].part
        assert torch.equal(dense_of(doubled.changes[NAME]), -2 * dense_of(one.changes[NAME]))
    check_applied(make_bert(), difference(*deltas.values()), expected_sum(deltas, [1, -1]))
    assert not difference(deltas["a"], deltas["a"]).changes
    assert not scaled(deltas["a"], 0).changes


def test_an_adapter_is_scaled_where_its_output_is_linear():
    adapter = {LAYER: Adapter((12,), 3)}
    model = make_bert().eval()
    one, half = drawn_delta(model, adapter, 1), scaled(drawn_delta(model, adapter, 1), 0.5)
    seen: list[Tensor] = []
    for delta in (None, one, half):
        applied = delta.apply(model) if delta else None
        hook = model.get_submodule(LAYER).register_forward_hook(lambda layer, inputs, output: seen.append(output))
        logits(model)
        hook.remove()
        if applied:
            applied.revert()
    plain, whole, scaled_output = seen
    assert (whole - plain).abs().max() > 0.1
    torch.testing.assert_close(scaled_output, plain + 0.5 * (whole - plain), rtol=1e-5, atol=1e-5)

    rows = drawn_delta(model, {NAME: PARTS["rows"]}, 2)
    assert sum_of({"a": one, "b": rows}, [1, 1]).changes.keys() == {LAYER, NAME}
    with pytest.raises(AdapeftError, match=f"'a' and 'c' both have an adapter behind '{LAYER}'"):
        sum_of({"a": one, "b": rows, "c": half}, [1, 1, 1])
    assert sum_of({"a": one, "c": half}, [1, 0]).changes.keys() == {LAYER}


def with_heads(*labels: str | None) -> dict[str, Delta]:
    """Return deltas a, b …, each with a head of its label, or without a head where the label is None."""
    model, deltas = make_bert(), {}
    for index, label in enumerate(labels):
        said = {"model": {"task": "sequence-classification", "labels": {"id2label": {"0": label}}}}
        delta = drawn_delta(model, {NAME: PARTS["rows"]}, index, head=True, **said)
        # Like a language model and classifiers on it: they share a base, and only the classifiers have a new head.
        deltas["abc"[index]] = replace(delta, new={}) if label is None else delta
    return deltas


def test_heads_have_a_mean():
    deltas = with_heads("x", "x", "x")
    result = interpolation(deltas, [0.5, 0.25, 0.25])
    assert result.description["heads"] is None
    for name, value in result.new.items():
        mean = sum(weight * delta.new[name].double()
                   for weight, delta in zip([0.5, 0.25, 0.25], deltas.values(), strict=True))  # fmt: skip
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-6)
    kept = interpolation(deltas, [0.5, 0.25, 0.25], heads="b")
    assert all(torch.equal(value, deltas["b"].new[name]) for name, value in kept.new.items())


def test_heads_that_have_no_mean():
    with pytest.raises(AdapeftError, match=r"'a' and 'b' have different labels, so .* heads='a'"):
        interpolation(with_heads("x", "y"), [0.5, 0.5])
    with pytest.raises(AdapeftError, match=r"'a' and 'b' do not both have new parameters.* heads='b'"):
        interpolation(with_heads(None, "y"), [0.5, 0.5])
    assert interpolation(with_heads(None, "y"), [1, 0]).new == {}
    result = interpolation(with_heads("x", "y"), [0.5, 0.5], heads="b")
    assert result.description["model"]["labels"] == {"id2label": {"0": "y"}}


def test_heads_have_no_sum():
    deltas = with_heads("x", "x", None)
    with pytest.raises(AdapeftError, match=r"'a' and 'b' each have their own 'classifier.weight': .* heads='a'"):
        sum_of(deltas, [1, 1, 1])
    for result, owner in (
        (sum_of(deltas, [1, 1, 1], heads="b"), "b"),
        (sum_of({name: deltas[name] for name in "cb"}, [1, 0.5]), "b"),
        (scaled(deltas["b"], 3), "b"),
        (difference(deltas["b"], deltas["c"]), "b"),
    ):
        assert result.new.keys() == deltas[owner].new.keys()
        assert all(torch.equal(value, deltas[owner].new[name]) for name, value in result.new.items())
    for name in ("c", "d"):
        with pytest.raises(AdapeftError, match=rf"heads = '{name}': no delta of that name has .*: 'a', 'b'"):
            sum_of(deltas, [1, 1, 1], heads=name)


def test_the_result_says_where_it_comes_from(tmp_path):
    deltas = with_heads("x", None)
    sum_of(deltas, [0.5, 2]).save(tmp_path / "sum.safetensors")
    said = Delta.load(tmp_path / "sum.safetensors").description
    assert said["method"] == "sum"
    assert [(source["name"], source["weight"]) for source in said["sources"]] == [("a", 0.5), ("b", 2)]
    assert said["heads"] == "a"
    assert said["model"] == deltas["a"].description["model"]


def test_bad_input():
    deltas = of_parts(a="rows", b="elements")
    for given in ([1], [1, 1, 1]):
        with pytest.raises(AdapeftError, match="give one for each of the 2 deltas"):
            sum_of(deltas, given)
    with pytest.raises(AdapeftError, match="finite"):
        sum_of(deltas, [1, float("nan")])
    with pytest.raises(AdapeftError, match=r"\[0.5, 0.6\] add up to 1.1"):
        interpolation(deltas, [0.5, 0.6])
    other = Delta(deltas["b"].changes, {}, "f" * 64)
    with pytest.raises(AdapeftError, match="'b' to one of ffffffffffff: only deltas of one base"):
        sum_of({"a": deltas["a"], "b": other}, [1, 1])
    wrong = drawn_delta(make_bert(), {NAME: Whole((3, 4))}, 1)
    with pytest.raises(AdapeftError, match=r"has shape \(12, 19\) in 'a' and \(3, 4\) in 'b'"):
        sum_of({"a": deltas["a"], "b": wrong}, [1, 1])
