"""Rank and layers of LoRA from the budget."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.lora.method import least_lora
from adapeft.methods.lora.options import LoRAOptions
from adapeft.methods.registry import Plan, get_method
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import OneRank

SIZES = (5, 5, 5, 8, 12, 5)
GROUPS = Groups(
    (
        *(ParameterInfo(f"linear{i}", (3, size), "linear", i, 0.0, 0, is_linear=True) for i, size in enumerate(SIZES)),
        ParameterInfo("outside", (3, 2), "outside", -1, 0.0, 0, is_linear=True),
        ParameterInfo("norm", (3,), "norm", 0, 0.0, None),
    ),
    "tensor",
    num_total=1000,
)
ALL = sum(3 + size for size in SIZES)
SETTINGS = LoRAOptions(method="lora")


def choose(budget, seed=0, groups=GROUPS):
    method = get_method("lora")
    method.check(groups, budget, SETTINGS)
    return method.choose(groups, Statistics(groups, {}), Plan(budget, 1.0, seed, SETTINGS), OneRank())


def test_all_layers_where_the_budget_holds_them():
    for budget, rank in ((ALL, 1), (2 * ALL - 1, 1), (2 * ALL, 2)):
        subset = choose(budget)
        assert {part.rank for part in subset.parts.values()} == {rank}
        assert list(subset.parts) == [f"linear{i}" for i in range(6)]
        assert (subset.choice.status, subset.choice.num_chosen) == ("rule", 6)


@pytest.mark.parametrize("budget", [8, 20, ALL - 1])
def test_a_draw_that_leaves_no_room_for_another_layer(budget):
    for seed in range(20):
        subset = choose(budget, seed)
        assert subset.count <= budget
        left = budget - subset.count
        assert all(3 + size > left for i, size in enumerate(SIZES) if f"linear{i}" not in subset.parts)
        assert {part.rank for part in subset.parts.values()} == {1}
        assert list(subset.parts) == sorted(subset.parts), "in the order of the model, whatever that of the draw"
        assert (subset.choice.status, subset.choice.num_groups) == ("drawn", 6)
        assert subset.choice.num_chosen == len(subset.parts)
        assert choose(budget, seed) == subset


def stack(num_blocks, *names):
    """Return the groups of a model whose blocks have a linear layer [3, 5] for each of ``names``."""
    infos = (
        ParameterInfo(f"{block}.{name}.weight", (3, 5), f"{name}.weight", block, 0.0, 0, is_linear=True)
        for block in range(num_blocks)
        for name in names
    )
    return Groups(tuple(infos), "tensor", num_total=10**6)


def test_every_layer_of_one_size_is_as_likely():
    groups = stack(6, "up", "down")
    drawn = Counter(name for seed in range(2000) for name in choose(3 * 8, seed, groups).parts)
    assert len(drawn) == 12
    assert all(abs(count - 500) < 80 for count in drawn.values()), "four standard deviations of 19.4"


@pytest.mark.parametrize("num_blocks", [1, 7, 30, 64])
def test_a_draw_is_even_over_the_depth(num_blocks):
    groups = stack(num_blocks, "up", "down", "value")
    for number in range(1, 3 * num_blocks):
        for seed in range(4):
            layers = [int(name.partition(".")[0]) for name in choose(8 * number, seed, groups).parts]
            assert len(layers) == number
            counts = Counter(layers)
            assert {counts[block] for block in range(num_blocks)} <= {number // num_blocks, number // num_blocks + 1}
            once = sorted(block for block in counts if counts[block] == max(counts.values()))
            gaps = [after - before for before, after in pairwise([*once, once[0] + num_blocks])]
            assert max(gaps) <= 3 * num_blocks / len(once) + 1


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),  # Llama, BART
        ("attention.self.query", "attention.self.key", "attention.self.value"),  # BERT
        ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),  # T5
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),  # DistilBERT
        ("self_attn.q_b_proj", "self_attn.q_a_proj", "self_attn.kv_b_proj"),  # DeepSeek
        ("attn.to_q", "attn.to_k", "attention.query_key_value"),  # the last one of GPT-NeoX, which is not divided
    ],
)
def test_queries_and_keys_are_drawn_last(query, key, value):
    groups = stack(4, query, key, value)
    for seed in range(20):
        for number in range(1, 12):
            roles = Counter(name.partition(".")[2] for name in choose(8 * number, seed, groups).parts)
            assert roles[f"{value}.weight"] == min(number, 4)


@pytest.mark.parametrize(("layers", "least"), [(1, 8), (20, 8), (26, 9), (100, 32)])
def test_the_smallest_budget_at_which_it_is_advised(layers, least):
    """One layer, or a 25th of rank 1 on all of them."""
    infos = (ParameterInfo(f"linear{i}", (3, 5), "linear", i, 0.0, 0, is_linear=True) for i in range(layers))
    assert least_lora(Groups(tuple(infos), "tensor", num_total=10**6)) == least
    assert least_lora(Groups(GROUPS.parameters[-2:], "tensor", num_total=10**6)) is None


def test_a_budget_below_the_smallest_layer():
    with pytest.raises(AdapeftError, match=r"budget is 7 .* smallest layer trains 8\. Raise the budget to 8, or"):
        choose(7)
