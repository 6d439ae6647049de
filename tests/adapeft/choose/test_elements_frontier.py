"""The frontier of single elements, against the choice at every budget."""

from __future__ import annotations

import numpy as np
import pytest

from adapeft.choose import elements_frontier as frontier
from adapeft.choose.elements_frontier import elements_frontier
from adapeft.choose.joint_elements import choose_elements_jointly
from adapeft.ranks import OneRank
from tests.adapeft.choose.test_joint_elements import candidates, drawn

BUDGETS = [1, 5, 50, 500, 5000]


@pytest.mark.parametrize("reach", [1e-4, 0.1, 100.0])
@pytest.mark.parametrize("seed", range(3))
def test_every_budget_has_the_value_of_its_choice(reach, seed):
    groups, shards = candidates(*drawn(seed, 5000), cuts=(70, 3000))
    found = elements_frontier(shards[::-1], BUDGETS, reach)
    assert found.budgets.tolist() == BUDGETS
    chosen = [choose_elements_jointly(groups, shards, budget, reach, OneRank()).choice for budget in BUDGETS]
    assert found.values == pytest.approx([one.value for one in chosen], rel=0.005)
    assert (found.bounds >= np.array([one.value for one in chosen]) * (1 - 1e-6)).all()
    assert (found.values <= found.bounds).all()
    assert (np.diff(found.values) >= 0).all()
    assert (found.costs <= found.budgets).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_budgets_just_below_what_is_chosen_without_one(share):
    groups, shards = candidates(*drawn(0, 5000))
    most = choose_elements_jointly(groups, shards, 5000, 0.3, OneRank()).count
    assert 50 < most < 5000
    (value,) = elements_frontier(shards, [round(share * most)], 0.3).values
    chosen = choose_elements_jointly(groups, shards, round(share * most), 0.3, OneRank()).choice
    assert value == pytest.approx(chosen.value, rel=5e-4)


def test_small_elements_are_sampled(monkeypatch):
    groups, shards = candidates(*drawn(0, 50_000))
    monkeypatch.setattr(frontier, "_EXACT", 2000)
    monkeypatch.setattr(frontier, "_SAMPLE", 2000)
    slopes, _, weights = frontier._thinned(shards)
    num_positive = int((shards[0].columns["slope"] > 0).sum())
    assert len(slopes) < 7000 < num_positive
    assert weights.sum() == pytest.approx(num_positive, rel=0.02)
    found = elements_frontier(shards, [100, 20_000], 0.1)
    for budget, value in zip(found.budgets.tolist(), found.values, strict=True):
        assert value == pytest.approx(
            choose_elements_jointly(groups, shards, budget, 0.1, OneRank()).choice.value, 0.03
        )


def test_nothing_rises_from_negative_slopes():
    slopes, curvatures = drawn(0, 20)
    _, shards = candidates(-abs(slopes), curvatures)
    found = elements_frontier(shards, [1, 10], 0.1)
    assert found.values.tolist() == [0.0, 0.0]
    assert found.costs.tolist() == [0, 0]
