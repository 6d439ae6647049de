"""Tests of SAM: top-k of the squared mean gradient over the whole calibration set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import adapeft
from adapeft.choose.knapsack import chosen_of
from adapeft.measure.groups import build_groups
from tests.oracles.measuring import group_sums, mean_gradients
from tests.support.tiny import make_batches, make_bert, make_gpt2


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_elements_are_the_largest_squared_mean_gradients(make):
    model = make()
    batches = make_batches(model)
    subset = adapeft.select(model, batches, method="sam", budget=400)
    groups = build_groups(model, "element")
    squared = torch.cat(mean_gradients(model, batches, groups)) ** 2
    starts = np.concatenate([[0], np.cumsum([info.count for info in groups.parameters])])
    chosen = torch.zeros(len(squared), dtype=torch.bool)
    for start, info in zip(starts[:-1], groups.parameters, strict=True):
        if info.name in subset.parts:
            chosen[int(start) + subset.parts[info.name].indices] = True
    assert chosen.sum() == 400
    limit = squared.topk(400).values[-1]
    assert (squared[chosen] >= limit * (1 - 1e-4)).all()
    assert (squared[~chosen] <= limit * (1 + 1e-4)).all()


def test_groups_sum_their_squares(bert):
    batches = make_batches(bert)
    subset = adapeft.select(bert, batches, method="sam", groups="tensor", budget=400)
    groups = build_groups(bert, "tensor")
    squares = group_sums(groups, [piece**2 for piece in mean_gradients(bert, batches, groups)])
    chosen = chosen_of(groups, subset) > 0
    assert subset.choice.value == pytest.approx(squares[chosen].sum(), rel=1e-4)


def test_measures_the_pretrained_model_without_warm_up(bert):
    batches = make_batches(bert)
    plain = adapeft.select(bert, batches, method="sam", budget=50)
    warm = adapeft.select(bert, batches, method="sam", budget=50, warmup_steps=20)
    none = adapeft.select(bert, batches, method="sam", budget=50, warmup_steps=0)
    assert plain.choice.value == none.choice.value
    assert plain.choice.value != warm.choice.value
