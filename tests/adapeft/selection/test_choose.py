"""Tests of choosing under a budget: its errors, and the knapsack and the top-k against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapeft.choose.elements import choose_elements
from adapeft.choose.knapsack import choose_groups, chosen_of, parts_of
from adapeft.config.load import parse_select
from adapeft.errors import AdapeftError
from adapeft.measure.directions import Directions
from adapeft.measure.groups import Groups
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.memory.limit import MemoryLimit
from adapeft.methods.registry import METHODS
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import OneRank
from adapeft.selection import choose as choosing
from adapeft.selection.choose import check_budget, choose, judged
from adapeft.subset.verdict import verdict_of
from tests.oracles.measuring import best_subset_value, top_k_by_sort

PARAMETERS = (
    ParameterInfo("linear", (4, 7), "linear", 0, 0.0, 0),
    ParameterInfo("bias", (4,), "bias", 0, 0.0, None),
    ParameterInfo("conv1d", (5, 3), "conv1d", 1, 1.0, 1),
    ParameterInfo("experts", (2, 3, 2), "experts", 1, 1.0, None),
)


def make_groups(granularity, num_total=100):
    return Groups(PARAMETERS, granularity, num_total=num_total, always_train=("head",), new=("head",), fingerprint="f")


def statistics_of(granularity, seed, num_total=100):
    generator = torch.Generator().manual_seed(seed)
    groups = make_groups(granularity, num_total)
    columns = {name: torch.rand(groups.num_groups, generator=generator).numpy() for name in ("slope", "curvature")}
    shards = []
    if granularity == "element":
        for index, info in enumerate(PARAMETERS):
            draws = {name: torch.rand(info.count, generator=generator) for name in ("slope", "curvature")}
            shards.append(ElementShard(Slice(index, 0, info.count), draws))
    return Statistics(groups, {name: column.astype(np.float64) for name, column in columns.items()}, tuple(shards))


@pytest.mark.parametrize(
    ("granularity", "budget", "message"),
    [
        ("row", 60, r"select.budget = 60 is 60 parameters, more than the 59 candidates"),
        ("row", "60%", r"select.budget = 60% is 60 parameters, more than the 59"),
        ("row", 3, r"select.budget = 3 is 3 parameters, less than the cheapest row group \(4\). Raise it"),
        ("tensor", "2%", r"less than the cheapest tensor group \(4\)"),
        ("element", 0.001, r"budget = 0.1%: is less than one of 100 parameters"),
    ],
)
def test_budgets_that_do_not_do(granularity, budget, message):
    settings = parse_select({"budget": budget, "groups": granularity})
    with pytest.raises(AdapeftError, match=message):
        choose(settings, statistics_of(granularity, 0), reach=1.0, seed=0, ranks=OneRank())


def test_nothing_to_choose():
    groups = Groups((), "row", num_total=100)
    with pytest.raises(AdapeftError, match="leave no parameter to choose"):
        check_budget(groups, parse_select({}))


def test_a_fraction_is_of_the_whole_base_model():
    assert check_budget(make_groups("row"), parse_select({"budget": "50%"})) == 50
    assert check_budget(make_groups("element"), parse_select({"budget": 1})) == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [4, 5, 17, 33, 59])
def test_groups_are_a_best_subset(budget, seed):
    groups = make_groups("row")
    values = np.random.default_rng(seed).normal(size=groups.num_groups)
    subset = choose_groups(groups, values, budget)
    best = best_subset_value(values, groups.counts, budget)
    chosen = chosen_of(groups, subset) > 0
    assert subset.count == groups.counts[chosen].sum() <= budget
    assert values[chosen].sum() == pytest.approx(subset.choice.value)
    assert best * (1 - 1e-4) - 1e-12 <= subset.choice.value <= best + 1e-12
    assert subset.choice.bound >= best - 1e-9
    assert subset.choice.num_chosen == chosen.sum()


def test_parts_of_a_mask_and_back():
    groups = make_groups("row")
    mask = np.array([1, 0, 1, 0, 1, 0, 0, 1, 0], dtype=bool)
    parts = parts_of(groups, mask)
    assert {name: (part.kind, part.describe()["dim"], part.count) for name, part in parts.items()} == {
        "linear": ("rows", 0, 14),
        "bias": ("tensor", 0, 4),
        "conv1d": ("rows", 1, 5),
    }
    assert parts["linear"].indices.tolist() == [0, 2]
    assert parts["conv1d"].indices.tolist() == [2]
    subset = choose_groups(groups, np.where(mask, 1.0, 0.0), 59)
    assert chosen_of(groups, subset).tolist() == (groups.counts * mask).tolist()


@pytest.mark.parametrize("budget", [1, 10, 59])
def test_elements_are_the_top_k_over_all_tensors(budget):
    statistics = statistics_of("element", 3)
    subset = choose_elements(
        statistics.groups, statistics.elements, lambda columns: columns["slope"] - 0.2, budget, OneRank()
    )
    scores = torch.cat([shard.columns["slope"] for shard in statistics.elements]) - 0.2
    expected, start = top_k_by_sort(scores, budget), 0
    for info in PARAMETERS:
        mine = [i - start for i in expected if start <= i < start + info.count]
        start += info.count
        assert (subset.parts[info.name].indices.tolist() if mine else None) == (mine or None)
        assert mine or info.name not in subset.parts
    assert subset.count == subset.choice.num_chosen == len(expected)
    assert subset.choice.value == pytest.approx(float(scores[expected].double().sum()))
    assert int(chosen_of(statistics.groups, subset).sum()) == subset.count


def test_elements_do_not_depend_on_the_slices():
    statistics = statistics_of("element", 3)
    whole = choose_elements(statistics.groups, statistics.elements, lambda columns: columns["slope"], 20, OneRank())
    pieces = []
    for shard in statistics.elements:
        for start, end in ((0, 3), (3, shard.slice.length)):
            columns = {name: column[start:end] for name, column in shard.columns.items()}
            pieces.append(ElementShard(Slice(shard.slice.parameter, start, end - start), columns))
    divided = choose_elements(statistics.groups, pieces[::-1], lambda columns: columns["slope"], 20, OneRank())
    assert {n: p.indices.tolist() for n, p in whole.parts.items()} == {
        n: p.indices.tolist() for n, p in divided.parts.items()
    }


@pytest.mark.parametrize("granularity", ["tensor", "row", "element"])
def test_never_exceeds_the_budget_and_says_how_it_was_chosen(granularity):
    for budget in range(4, 60):
        settings = parse_select({"budget": budget, "groups": granularity})
        subset = choose(settings, statistics_of(granularity, budget), reach=0.5, seed=7, ranks=OneRank())
        assert 0 < subset.count <= budget
    assert (subset.always_train, subset.new) == (("head",), ("head",))
    said = {"method": "adapeft", "granularity": granularity, "budget": 59, "num_total": 100, "reach": 0.5, "seed": 7}
    assert said.items() <= subset.choice.recorded().items()
    assert subset.choice.fingerprint == "f"


def test_the_reach_decides():
    """A steep group of high curvature wins only where training stops early."""
    groups = Groups(tuple(ParameterInfo(name, (4,), name, 0, 0.0, None) for name in "ab"), "tensor", 8)
    statistics = Statistics(groups, {"slope": np.array([2.0, 1.0]), "curvature": np.array([100.0, 1.0])})
    settings = parse_select({"budget": 4, "groups": "tensor"})
    near = choose(settings, statistics, reach=1e-3, seed=0, ranks=OneRank())
    far = choose(settings, statistics, reach=float("inf"), seed=0, ranks=OneRank())
    assert (set(near.parts), set(far.parts)) == ({"a"}, {"b"})
    values = METHODS["adapeft"].group_values(statistics, float("inf"))
    assert values.tolist() == [0.02, 0.5]


@pytest.mark.parametrize(
    ("fill", "directions", "is_filled"),
    [
        ("auto", Directions(3.2, 10.0), True),
        ("auto", Directions(9.0, 10.0), True),
        ("auto", None, True),
        (False, None, False),
        (True, Directions(9.0, 10.0), True),
        (False, Directions(3.2, 10.0), False),
    ],
)
def test_what_a_choice_leaves_is_drawn(monkeypatch, fill, directions, is_filled):
    monkeypatch.setattr(choosing, "measure_directions", lambda passes, groups, parts: directions)
    statistics = statistics_of("element", 0)
    settings = parse_select({"budget": 30, "fill": fill})
    plain, filled = (
        judged(choose(one, statistics, reach=100.0, seed=4, ranks=OneRank()), None, statistics.groups, one, seed=4)
        for one in (settings.model_copy(update={"fill": False}), settings)
    )
    left = plain.choice.unspent
    assert 0 < left < 30
    assert filled.choice.directions == (directions and directions.chosen)
    assert (filled.count, filled.choice.num_drawn) == ((30, left) if is_filled else (30 - left, None))
    assert (filled.always_train, filled.new) == (plain.always_train, plain.new) == (("head",), ("head",))
    for name, part in plain.parts.items():
        assert set(part.indices.tolist()) <= set(filled.parts[name].indices.tolist())


@pytest.mark.parametrize(
    ("settings", "directions", "num_trained", "advice"),
    [
        ({"budget": 30}, 9.0, 30, "fill"),
        ({"budget": 30, "fill": False}, 9.0, None, "draw"),
        ({"budget": 1}, 9.0, 1, "choose"),  # leaves nothing
        ({"budget": "auto"}, 9.0, 15, "fill"),
        ({"budget": "auto", "fill": False}, 3.2, None, "draw"),
        ({"memory_per_device": 10_000}, 9.0, 30, "fill"),
    ],
)
def test_a_budget_is_spent_unless_fill_is_false(monkeypatch, settings, directions, num_trained, advice):
    monkeypatch.setattr(choosing, "measure_directions", lambda passes, groups, parts: Directions(directions, 10.0))
    statistics = statistics_of("element", 0, num_total=3000)
    limit = MemoryLimit(limit=10_000, room=30 * 28, whole=16.0, leaf=20.0) if "memory_per_device" in settings else None
    one = parse_select({"groups": "element"} | settings)
    chosen = choose(one, statistics, reach=100.0, seed=4, ranks=OneRank(), limit=limit)
    found = judged(chosen, None, statistics.groups, one, 4, limit)
    assert found.count == (num_trained or chosen.count)
    assert found.choice.num_drawn == (found.count - chosen.count or None)
    assert verdict_of(found.choice).advice == advice


@pytest.mark.parametrize(
    ("settings", "is_drawn"),
    [
        ({}, True),
        ({"fill": False}, False),
        ({"fill": True}, False),
        ({"joint": False}, False),
        ({"groups": "row"}, False),
    ],
)
def test_a_choice_by_noise_is_the_draw_of_the_random_method(monkeypatch, settings, is_drawn):
    monkeypatch.setattr(choosing, "reliability_of", lambda statistics, ranks: 0.24)
    monkeypatch.setattr(choosing, "measure_directions", lambda passes, groups, parts: Directions(9.0, 10.0))
    one = parse_select({"budget": 30, "groups": "element"} | settings)
    statistics = statistics_of(one.granularity, 0)
    found = judged(choose(one, statistics, reach=100.0, seed=5, ranks=OneRank()), None, statistics.groups, one, seed=5)
    same = parse_select({"budget": found.choice.budget, "method": "random", "groups": "element"})
    drawn = choose(same, statistics_of("element", 0), reach=100.0, seed=5, ranks=OneRank())
    assert found.choice.is_drawn is is_drawn
    assert (found.choice.method, found.choice.reliability) == ("adapeft", 0.24)
    assert (found.choice.value is None, found.choice.directions is None) == (is_drawn, is_drawn)
    if is_drawn:
        assert _positions(found) == _positions(drawn)


def _positions(subset):
    return {name: part.mask().nonzero().squeeze(1).tolist() for name, part in subset.parts.items()}


def test_slopes_above_noise_are_not_replaced(monkeypatch):
    monkeypatch.setattr(choosing, "reliability_of", lambda statistics, ranks: 0.26)
    statistics, settings = statistics_of("element", 0), parse_select({"budget": 30})
    found = choose(settings, statistics, reach=100.0, seed=4, ranks=OneRank())
    assert found.choice.value > 0
    assert not found.choice.is_drawn


def test_nothing_chosen_by_noise_stays_nothing(monkeypatch):
    monkeypatch.setattr(choosing, "reliability_of", lambda statistics, ranks: 0.0)
    statistics = statistics_of("element", 0)
    for shard in statistics.elements:
        shard.tensors["slope"].neg_()
    found = choose(parse_select({"budget": 30}), statistics, reach=100.0, seed=4, ranks=OneRank())
    assert (found.count, found.choice.is_drawn) == (0, False)


def test_a_filled_choice_has_the_price_of_all_of_it(monkeypatch):
    monkeypatch.setattr(choosing, "measure_directions", lambda passes, groups, parts: None)
    statistics, limit = statistics_of("element", 0), MemoryLimit(limit=10_000, room=30 * 28, whole=16.0, leaf=20.0)
    settings = parse_select({"memory_per_device": 10_000})
    chosen = choose(settings, statistics, reach=100.0, seed=4, ranks=OneRank(), limit=limit)
    filled = judged(chosen, None, statistics.groups, settings, 4, limit)
    assert chosen.count < filled.count == 30
    assert filled.choice.memory_bytes == 30 * 28 > chosen.choice.memory_bytes
    assert filled.choice.budget == 30
