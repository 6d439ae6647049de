"""Tests of the baseline scores against a plain float64 computation of each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import adapeft
from adapeft.choose.elements import shares
from adapeft.measure.groups import build_groups
from tests.oracles.measuring import gradients, mean_gradients
from tests.support.tiny import make_batches, make_bert, make_gpt2

BUDGET = 200


def dense_scores(model, method, batches, groups):
    """Return one flat float64 tensor per candidate."""
    if method == "magnitude":
        return [model.get_parameter(info.name).detach().double().abs().flatten() for info in groups.parameters]
    if method == "snip":
        weights = [model.get_parameter(info.name).detach().double().flatten() for info in groups.parameters]
        gradient = mean_gradients(model, batches, groups)
        return [(g * w).abs() for g, w in zip(gradient, weights, strict=True)]
    if method == "fish":
        batches = [
            {name: value[i : i + 1] for name, value in b.items()} for b in batches for i in range(len(b["labels"]))
        ]
    each = [gradients(model, batch, groups) for batch in batches]
    return [sum(piece.square() for piece in pieces) / len(each) for pieces in zip(*each, strict=True)]


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("method", ["magnitude", "snip", "fish", "child-tuning-d"])
def test_the_elements_of_largest_score(make, method):
    model = make()
    batches = make_batches(model)
    groups = build_groups(model, "element")
    scores = dense_scores(model, method, batches, groups)
    subset = adapeft.select(model, batches, method=method, budget=BUDGET, warmup_steps=0)

    flat = torch.cat(scores)
    threshold = flat.topk(BUDGET).values[-1]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    starts = np.concatenate([[0], np.cumsum([info.count for info in groups.parameters])])
    for index, info in enumerate(groups.parameters):
        if info.name in subset.parts:
            chosen[subset.parts[info.name].indices + int(starts[index])] = True
    assert int(chosen.sum()) == BUDGET
    # Exactly the largest, except for rounding at the border.
    assert (flat[chosen] >= threshold * (1 - 1e-4)).all()
    assert (flat[~chosen] <= threshold * (1 + 1e-4)).all()


def test_fish_sees_single_examples_where_child_tuning_sees_batches():
    model = make_bert()
    batches = make_batches(model)
    fish, child = (
        adapeft.select(model, batches, method=method, budget=BUDGET, warmup_steps=0)
        for method in ("fish", "child-tuning-d")
    )
    assert repr(fish.parts) != repr(child.parts)


def test_scope_tensor_shares_the_budget_by_size():
    model = make_bert()
    groups = build_groups(model, "element")
    sizes = np.array([info.count for info in groups.parameters])
    expected = shares(sizes, BUDGET)
    assert expected.sum() == BUDGET
    assert np.abs(expected - BUDGET * sizes / sizes.sum()).max() < 1
    subset = adapeft.select(model, make_batches(model), method="magnitude", scope="tensor", budget=BUDGET)
    found = [subset.parts[info.name].count if info.name in subset.parts else 0 for info in groups.parameters]
    assert found == expected.tolist()
    for info in groups.parameters:
        if info.name in subset.parts:
            weight = model.get_parameter(info.name).detach().abs().flatten()
            part = subset.parts[info.name]
            assert set(part.indices.tolist()) == set(weight.topk(part.count).indices.tolist())


def test_greedy_is_no_better_than_the_knapsack():
    model = make_bert()
    options = {"groups": "tensor", "budget": "30%", "learning_rate": 1e-2, "num_steps": 50}
    greedy, best = (
        adapeft.select(model, make_batches(model, 8), solver=solver, **options) for solver in ("greedy", "knapsack")
    )
    assert 0 < greedy.choice.value <= best.choice.value * (1 + 1e-9)
    assert greedy.choice.bound == pytest.approx(best.choice.bound, rel=1e-6)
