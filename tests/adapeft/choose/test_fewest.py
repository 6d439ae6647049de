"""The fewest parameters that promise nearly what a whole budget promises, against the choice at every budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapeft.choose.fewest import ENOUGH, fewest
from adapeft.choose.joint_elements import choose_elements_jointly, choose_fewest_jointly
from adapeft.choose.knapsack import choose_groups
from adapeft.config.load import parse_select
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.options import OPTIONS
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import OneRank
from adapeft.selection.choose import choose, completed
from tests.adapeft.choose.test_joint_elements import candidates, drawn
from tests.support.thread_ranks import on_ranks


def smallest(value, largest):
    """Return the smallest budget whose value is enough, from the value of every budget."""
    return next(budget for budget in range(1, largest + 1) if value(budget) >= ENOUGH * value(largest))


@pytest.mark.parametrize(("seed", "reach"), [(0, 1e-4), (1, 0.1), (2, 0.1), (3, 3.0)])
def test_elements_are_as_few_as_possible(seed, reach):
    groups, shards = candidates(*drawn(seed, 1000))

    def at(budget):
        return choose_elements_jointly(groups, shards, budget, reach, OneRank())

    best = at(100)
    found = choose_fewest_jointly(groups, shards, best, reach, OneRank())
    assert found.choice.value >= ENOUGH * best.choice.value
    expected = smallest(lambda budget: at(budget).choice.value, 100)
    assert expected <= found.count <= 1.06 * expected + 1
    assert found.choice.bound >= found.choice.value
    assert found.choice.gap == pytest.approx(1 - found.choice.value / found.choice.bound)


def test_elements_do_not_depend_on_their_division():
    slopes, curvatures = drawn(0, 1000)
    groups, whole = candidates(slopes, curvatures)
    _, shards = candidates(slopes, curvatures, cuts=(400, 700))

    def chosen(elements, ranks):
        best = choose_elements_jointly(groups, elements, 100, 0.1, ranks)
        return choose_fewest_jointly(groups, elements, best, 0.1, ranks).parts["w"].indices

    alone = chosen(whole, OneRank())
    assert 0 < len(alone) < 100
    assert torch.equal(chosen(shards[::-1], OneRank()), alone)
    for one in on_ranks(2, lambda ranks: chosen(shards[ranks.rank :: 2], ranks)):
        assert torch.equal(one, alone)


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_as_few_as_possible(seed):
    groups = Groups((ParameterInfo("w", (400, 3), "w", 0, 0.0, 0),), "row", 1200)
    values = np.random.default_rng(seed).exponential(size=400) ** 3
    best = choose_groups(groups, values, 600)
    found = fewest(best, lambda budget: choose_groups(groups, values, budget))
    expected = smallest(lambda budget: choose_groups(groups, values, 3 * budget).choice.value, 200) * 3
    assert found.choice.value >= ENOUGH * best.choice.value
    assert expected <= found.count <= 1.06 * expected + 3


def test_one_group_that_has_it_all():
    groups = Groups((ParameterInfo("w", (4, 3), "w", 0, 0.0, 0),), "row", 1200)
    values = np.array([0.0, 9.0, -1.0, 0.01])
    best = choose_groups(groups, values, 12)
    assert fewest(best, lambda budget: choose_groups(groups, values, budget)).parts["w"].indices.tolist() == [1]


def statistics_of(slopes, curvatures):
    """Return statistics of the elements of a model, of which 0.5 % are 500."""
    found, shards = candidates(slopes, curvatures)
    groups = Groups(found.parameters, "element", 100_000)
    slopes = {"slope": shards[0].columns["slope"].double().numpy()}
    return Statistics(groups, slopes, tuple(shards))


def chosen_of(statistics, budget, *, fill=False, reach=0.01):
    return choose(parse_select({"budget": budget, "fill": fill}), statistics, reach=reach, seed=0, ranks=OneRank())


def test_auto_takes_fewer_than_its_most():
    statistics = statistics_of(*drawn(0, 2000))
    most, found = chosen_of(statistics, "0.5%"), chosen_of(statistics, "auto")
    assert found.count < most.count <= 500
    assert found.choice.share == pytest.approx(found.choice.value / most.choice.value)
    assert ENOUGH <= found.choice.share < 1
    assert (found.choice.budget, found.choice.unspent) == (found.count, 0)


def test_where_slopes_are_noise_auto_draws_its_most():
    slopes, curvatures = drawn(0, 2000)
    noise = statistics_of(slopes - slopes.mean(), curvatures)
    most, found = (chosen_of(noise, budget, fill="auto") for budget in ("0.5%", "auto"))
    assert abs(found.choice.reliability) < 0.1
    assert torch.equal(found.parts["w"].indices, most.parts["w"].indices)
    assert (found.choice.budget, found.choice.share, found.count) == (500, None, 500)
    assert found.choice.is_drawn


@pytest.mark.parametrize("fill", ["auto", True])
def test_a_draw_fills_up_to_the_most(fill):
    statistics = statistics_of(*drawn(0, 2000))
    found = chosen_of(statistics, "auto", fill=fill, reach=1.0)
    filled = completed(statistics.groups, found, None, parse_select({"budget": "auto", "fill": fill}), 0)
    assert filled.count == filled.choice.budget == 500
    assert filled.choice.num_drawn == 500 - found.count > 0
    assert filled.choice.share is None


def test_few_candidates_are_all_allowed():
    found = chosen_of(statistics_of(*drawn(2, 80)), "auto")
    assert 0 < found.count < 80
    assert not found.choice.is_drawn


def test_only_a_predicted_loss_decrease_tells_how_many_suffice():
    for method in OPTIONS:
        if method != "adapeft":
            with pytest.raises(AdapeftError, match=f"budget = auto: {method} predicts no loss decrease"):
                parse_select({"method": method, "budget": "auto"})
    with pytest.raises(AdapeftError, match="budget = auto is another limit"):
        parse_select({"budget": "auto", "memory_per_device": "1GiB"})
