"""Choosing single elements by their joint influence, against all subsets."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

import adapeft
from adapeft.choose.draw import draw_elements
from adapeft.choose.elements import filled_by_draw, subset_at, without_draw
from adapeft.choose.joint_elements import choose_elements_jointly
from adapeft.config.load import parse_select
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups, ParameterInfo
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.methods.options import OPTIONS
from adapeft.parts.elements import Elements
from adapeft.ranks import OneRank
from adapeft.selection.choose import choose
from tests.support.thread_ranks import on_ranks
from tests.support.tiny import make_batches, make_bert


def candidates(slopes, curvatures, cuts=()):
    """Return one parameter with these elements, divided into shards at ``cuts``."""
    borders = [0, *cuts, len(slopes)]
    groups = Groups((ParameterInfo("w", (len(slopes),), "w", 0, 0.0, None),), "element", len(slopes))
    columns = {"slope": torch.tensor(slopes).float(), "curvature": torch.tensor(curvatures).float()}
    shards = [
        ElementShard(Slice(0, low, high - low), {name: column[low:high] for name, column in columns.items()})
        for low, high in pairwise(borders)
    ]
    return groups, shards


def drawn(seed, count):
    random = np.random.default_rng(seed)
    return random.normal(0.3, 1.0, count) * 10 ** random.uniform(-2, 0, count), 10 ** random.uniform(-4, 1, count)


def joint(slopes, curvatures, chosen, reach):
    """Return the maximum over a fine grid of steps t ≤ reach of t·Σb − t²(Σ√A)²/2."""
    steps = np.linspace(0, reach, 4001)
    chosen = list(chosen)
    return float((steps * slopes[chosen].sum() - 0.5 * (steps * np.sqrt(curvatures[chosen]).sum()) ** 2).max())


@pytest.mark.parametrize("reach", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_subset_is_above_the_bound_and_the_choice_is_near_the_best(seed, reach):
    slopes, curvatures = drawn(seed, 12)
    subset = choose_elements_jointly(*candidates(slopes, curvatures), 5, reach, OneRank())
    said, chosen = subset.choice.recorded(), subset.parts["w"].indices.tolist()
    best = max(joint(slopes, curvatures, some, reach) for size in range(1, 6) for some in combinations(range(12), size))
    assert len(chosen) <= 5
    assert said["value"] == pytest.approx(joint(slopes, curvatures, chosen, reach), rel=1e-4)
    assert said["value"] <= best * (1 + 1e-4)
    assert best <= said["bound"] * (1 + 1e-6)
    assert said["value"] >= 0.8 * best
    assert said["gap"] == pytest.approx(1 - said["value"] / said["bound"])
    assert said["unspent"] == 5 - len(chosen)


@pytest.mark.parametrize("reach", [1e-3, 0.03, 1.0])
def test_of_many_elements_the_choice_is_optimal(reach):
    said = choose_elements_jointly(*candidates(*drawn(0, 20_000)), 500, reach, OneRank()).choice.recorded()
    assert (said["status"], said["gap"] <= 1e-4) == ("within_gap", True)


def test_at_no_reach_the_steepest_are_chosen():
    slopes, curvatures = drawn(1, 1000)
    subset = choose_elements_jointly(*candidates(slopes, curvatures), 50, 1e-9, OneRank())
    assert subset.parts["w"].indices.tolist() == sorted(np.argsort(-slopes)[:50].tolist())


def test_the_farther_the_flatter_and_the_fewer():
    slopes, curvatures = drawn(2, 5000)
    sets = [
        choose_elements_jointly(*candidates(slopes, curvatures), 500, reach, OneRank()).parts["w"].indices.numpy()
        for reach in (1e-4, 1e-2, 1.0, 100.0)
    ]
    mean_roots = [np.sqrt(curvatures[chosen]).mean() for chosen in sets]
    assert mean_roots == sorted(mean_roots, reverse=True)
    assert [len(sets[0]), len(sets[1])] == [500, 500]
    assert 500 > len(sets[2]) > len(sets[3]), "what would add more curvature than slope is left"


def test_the_rest_of_the_budget_is_drawn_among_the_others():
    slopes, curvatures = drawn(2, 5000)
    given = candidates(slopes, curvatures)
    subset = choose_elements_jointly(*given, 500, 100.0, OneRank())
    chosen, seen = subset.parts["w"].indices.tolist(), set()
    for seed in range(20):
        filled = filled_by_draw(given[0], subset, seed)
        indices, said = filled.parts["w"].indices.tolist(), filled.choice.recorded()
        assert len(set(indices)) == 500
        assert set(chosen) < set(indices)
        assert (said["num_chosen"], said["num_drawn"], said["unspent"]) == (len(chosen), 500 - len(chosen), 0)
        seen |= set(indices) - set(chosen)
    # Each of the others is missed by 20 draws with probability (1 - 1/10)^20 = 0.12.
    assert 0.85 < len(seen) / (5000 - len(chosen)) < 0.91
    spread = np.histogram(sorted(seen), bins=10, range=(0, 5000))[0]
    assert spread.min() > 0.75 * spread.max()


@pytest.mark.parametrize("budget", [500, 4000])
def test_what_was_chosen_is_found_in_the_filled_subset(budget):
    slopes, curvatures = drawn(2, 5000)
    given = candidates(slopes, curvatures)
    subset = choose_elements_jointly(*given, budget, 100.0, OneRank())
    chosen, seen = set(subset.parts["w"].indices.tolist()), 0
    for seed in range(20):
        filled = filled_by_draw(given[0], subset, seed).described(seed=seed)
        found = without_draw(given[0], filled)
        assert (found.count, found.choice.unspent, found.choice.num_drawn) == (len(chosen), budget - len(chosen), None)
        again = filled_by_draw(given[0], found, seed)
        assert again.parts["w"].indices.tolist() == filled.parts["w"].indices.tolist()
        # What was chosen and drawn alike counts as drawn, and as many that were drawn next as chosen.
        alike = chosen - set(found.parts["w"].indices.tolist())
        assert alike <= set(draw_elements(given[0], budget, seed)[: budget - len(chosen)].tolist())
        seen += len(alike)
        assert without_draw(given[0], filled.described(seed=seed + 1)) is None
    assert 0 < seen < 20 * len(chosen)
    assert without_draw(given[0], subset) is subset


def test_chosen_elements_are_found_exactly_where_none_of_them_is_drawn():
    slopes, curvatures = drawn(2, 50_000)
    given = candidates(slopes, curvatures)
    subset = choose_elements_jointly(*given, 60, 1000.0, OneRank())
    chosen = subset.parts["w"].indices
    assert not set(draw_elements(given[0], 60, 3).tolist()) & set(chosen.tolist())
    filled = filled_by_draw(given[0], subset, 3).described(seed=3)
    assert filled.count == 60
    assert without_draw(given[0], filled).parts["w"].indices.tolist() == chosen.tolist()


def test_one_element_less_in_the_choice_is_one_more_in_the_draw():
    """Rounding that differs between numbers of workers may move an element, and no more than one."""
    groups, _ = candidates(*drawn(2, 5000))
    positions = np.random.default_rng(1).choice(5000, 40, replace=False)
    for seed in range(20):
        more, less = (
            filled_by_draw(groups, subset_at(groups, chosen).described(unspent=500 - len(chosen)), seed)
            for chosen in (positions, positions[1:])
        )
        trained = [set(one.parts["w"].indices.tolist()) for one in (more, less)]
        assert len(trained[0] - trained[1]) <= 1
        assert len(trained[1] - trained[0]) <= 1
        drawn_alone = set(draw_elements(groups, 500, seed).tolist())
        assert trained[0] <= drawn_alone | set(positions.tolist()), "the draw is that of the random method"


def test_another_subset_has_no_known_draw():
    slopes, curvatures = drawn(2, 5000)
    given = candidates(slopes, curvatures)
    filled = filled_by_draw(given[0], choose_elements_jointly(*given, 500, 100.0, OneRank()), 0)
    moved = Elements((5000,), (filled.parts["w"].indices + 1) % 5000)
    for parts in ({"w": moved}, {"v": filled.parts["w"]}, {"w": Elements((6000,), filled.parts["w"].indices)}):
        assert without_draw(given[0], replace(filled, parts=parts)) is None
    for num_drawn in (501, 10**9, 1):
        assert without_draw(given[0], filled.described(num_drawn=num_drawn)) is None


@pytest.mark.parametrize("chosen", [[0], [4], [0, 1, 4], [1, 3], [0, 1, 2, 3]])
def test_draws_reach_exactly_the_elements_that_were_not_chosen(chosen):
    groups, _ = candidates(np.ones(5), np.ones(5))
    for size in range(len(chosen), 6):
        subset = subset_at(groups, np.array(chosen)).described(unspent=size - len(chosen))
        reached = set()
        for seed in range(30):
            indices = filled_by_draw(groups, subset, seed).parts["w"].indices.tolist()
            assert len(set(indices)) == size
            assert set(chosen) <= set(indices)
            reached |= set(indices)
        assert reached == (set(range(5)) if size > len(chosen) else set(chosen))


def test_nothing_is_drawn_if_nothing_is_chosen_or_all_is_spent():
    slopes, curvatures = drawn(2, 50)
    for given, reach, count in (
        (candidates(-abs(slopes), curvatures), 1.0, 0),
        (candidates(slopes, curvatures), 1e-6, 5),
    ):
        subset = filled_by_draw(given[0], choose_elements_jointly(*given, 5, reach, OneRank()), 0)
        assert (subset.count, subset.choice.num_drawn) == (count, None)


def test_it_does_not_depend_on_the_shards():
    slopes, curvatures = drawn(3, 1000)
    whole = choose_elements_jointly(*candidates(slopes, curvatures), 100, 0.1, OneRank())
    groups, shards = candidates(slopes, curvatures, cuts=(1, 300, 301, 800))
    divided = choose_elements_jointly(groups, shards[::-1], 100, 0.1, OneRank())
    assert torch.equal(whole.parts["w"].indices, divided.parts["w"].indices)
    assert whole.choice.value == pytest.approx(divided.choice.value, rel=1e-9)


def test_ranks_find_what_one_finds():
    slopes, curvatures = drawn(4, 1000)
    groups, shards = candidates(slopes, curvatures, cuts=(400, 700))
    found = on_ranks(2, lambda ranks: choose_elements_jointly(groups, shards[ranks.rank :: 2], 100, 0.1, ranks))
    alone = choose_elements_jointly(groups, shards, 100, 0.1, OneRank())
    for one in found:
        assert torch.equal(one.parts["w"].indices, alone.parts["w"].indices)


def test_no_element_promises_anything():
    subset = choose_elements_jointly(*candidates([-1.0, 0.0], [1.0, 1.0]), 1, 0.1, OneRank())
    assert (subset.parts, subset.choice.value) == ({}, 0.0)


def test_the_method_chooses_so():
    slopes, curvatures = drawn(5, 500)
    groups, shards = candidates(slopes, curvatures)
    settings = parse_select({"budget": 50, "groups": "element", "joint": True})
    chosen = choose(settings, Statistics(groups, {}, tuple(shards)), reach=0.2, seed=0, ranks=OneRank())
    alone = choose_elements_jointly(groups, shards, 50, 0.2, OneRank())
    assert torch.equal(chosen.parts["w"].indices, alone.parts["w"].indices)
    assert chosen.choice.value == alone.choice.value


def test_on_a_model():
    model = make_bert()
    subset = adapeft.select(model, make_batches(model), budget=200, groups="element", joint=True, warmup_steps=4)
    assert 0 < subset.count <= 200
    assert 0 < subset.choice.value <= subset.choice.bound


@pytest.mark.parametrize(
    ("more", "said"),
    [({"reach": "inf"}, "would then choose a single element"), ({"scope": "tensor"}, "values all tensors together")],
)
def test_what_does_not_go_with_it(more, said):
    with pytest.raises(AdapeftError, match=said):
        parse_select({"groups": "element", "joint": True, **more})


@pytest.mark.parametrize(
    ("settings", "is_joint"),
    [
        ({}, True),
        ({"reach": 0.1}, True),
        ({"joint": False}, False),
        ({"reach": "inf"}, False),
        ({"scope": "tensor"}, False),
        ({"probe_steps": 9}, False),
        ({"groups": "row"}, False),
    ],
)
def test_what_is_joint_unless_it_is_said(settings, is_joint):
    assert parse_select({"groups": "element", **settings}).chooses_jointly is is_joint


def test_no_other_method_chooses_jointly():
    others = [options for method, options in OPTIONS.items() if method != "adapeft"]
    assert not any(hasattr(options, "chooses_jointly") for options in others)


def test_a_choice_by_elements_is_joint_unless_it_is_said():
    slopes, curvatures = drawn(6, 500)
    groups, shards = candidates(slopes, curvatures)

    def chosen(**settings):
        settings = parse_select({"budget": 50, "groups": "element", **settings})
        found = choose(settings, Statistics(groups, {}, tuple(shards)), reach=3.0, seed=0, ranks=OneRank())
        return found.parts["w"].indices.tolist()

    assert chosen() == chosen(joint=True)
    assert chosen() != chosen(joint=False)
    assert len(chosen(joint=False)) == 50


def test_elements_are_joint_under_a_budget_in_bytes_and_rows_are_not():
    for joint in (True, "auto"):
        assert parse_select({"groups": "element", "joint": joint, "memory_per_device": "2GiB"}).chooses_jointly
    with pytest.raises(AdapeftError, match="joint = true needs a budget of parameters"):
        parse_select({"groups": "row", "joint": True, "memory_per_device": "2GiB"})
