"""Choosing groups by their joint influence."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

import adapeft
from adapeft.choose.joint import choose_groups_jointly, choose_jointly, joint_value
from adapeft.measure.groups import build_groups
from adapeft.measure.storage import load_groups, save_groups
from tests.support.tiny import make_batches, make_bert


def dense_value(slopes, projections, chosen, reach):
    """Return the maximum over 0 ≤ t ≤ reach of t·b − t²A/2 on a fine grid, A from the dense matrix of cross terms."""
    matrix = projections @ projections.T
    mask = np.asarray(chosen, dtype=float)
    steps = np.linspace(0, reach, 20001)
    return float((steps * (mask @ slopes) - 0.5 * steps**2 * (mask @ matrix @ mask)).max())


@pytest.mark.parametrize("seed", range(5))
def test_joint_value_is_the_best_step_within_the_reach(seed):
    random = np.random.default_rng(seed)
    slopes, projections = random.normal(size=6), random.normal(size=(6, 4))
    for chosen in ([1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]):
        mask = np.array(chosen, dtype=bool)
        found = joint_value(slopes[mask], projections[mask], 0.3)
        assert found == pytest.approx(max(dense_value(slopes, projections, chosen, 0.3), 0.0), abs=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_near_the_best_of_all_sets(seed):
    random = np.random.default_rng(seed)
    slopes = random.exponential(size=9)
    projections = random.normal(size=(9, 3)) + 1.0  # groups whose projections mostly agree
    costs = random.integers(1, 6, size=9)
    budget = int(costs.sum() // 3)
    chosen = choose_jointly(slopes, projections, costs, budget, reach=0.2)
    assert costs[chosen].sum() <= budget
    masks = (np.array(mask, dtype=bool) for mask in product([0, 1], repeat=9))
    best = max(
        joint_value(slopes[mask], projections[mask], 0.2) for mask in masks if mask @ costs <= budget and mask.any()
    )
    assert joint_value(slopes[chosen], projections[chosen], 0.2) >= 0.85 * best


def test_two_of_a_kind_are_not_both_taken():
    """The knapsack takes both of two identical groups; with their joint curvature another group is better."""
    slopes = np.array([1.0, 1.0, 0.8])
    projections = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    chosen = choose_jointly(slopes, projections, np.array([1, 1, 1]), 2, reach=1.0)
    assert chosen[2]
    assert chosen.sum() == 2


def test_select_jointly_beats_the_sum(tmp_path):
    model = make_bert()
    batches = make_batches(model, 8)
    options = {"budget": "20%", "groups": "row", "learning_rate": 1e-2, "num_steps": 20}
    joint = adapeft.select(model, batches, joint=True, warmup_steps=4, **options)
    single = adapeft.select(model, batches, warmup_steps=4, **options)
    values = joint.choice.joint_values
    assert joint.choice.value == max(values.values())
    assert joint.count <= joint.choice.budget
    assert single.choice.gap is not None
    assert 0 < single.choice.joint_value < single.choice.value
    assert single.choice.joint_value <= joint.choice.value
    assert single.choice.adds_up
    assert not joint.choice.adds_up


def test_projections_survive_the_table(tmp_path):
    groups = build_groups(make_bert(), "tensor")
    columns = {
        "slope": np.arange(groups.num_groups, dtype=np.float64),
        "projections": np.random.default_rng(0).normal(size=(groups.num_groups, 5)).astype(np.float32),
    }
    save_groups(tmp_path, groups, columns, {})
    _, found, _ = load_groups(tmp_path)
    assert found["projections"].dtype == np.float32
    np.testing.assert_array_equal(found["projections"], columns["projections"])


def test_statistics_of_earlier_versions_without_cross_terms_are_refused(tmp_path):
    groups = build_groups(make_bert(), "tensor")
    ones = np.ones(groups.num_groups)
    save_groups(tmp_path, groups, {"slope": ones, "curvature": ones}, {})
    _, found, _ = load_groups(tmp_path)
    with pytest.raises(adapeft.AdapeftError, match=r"groups.parquet: column 'projections' is missing. Measure again."):
        choose_groups_jointly(groups, found, 10, 1.0)
