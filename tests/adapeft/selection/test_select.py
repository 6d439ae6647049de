"""Tests of ``adapeft.select``: its refusals, and that it leaves the model unchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import DataLoader

import adapeft
from adapeft.choose.knapsack import chosen_of
from adapeft.errors import AdapeftError
from adapeft.measure.groups import build_groups
from adapeft.measure.influence import planned_reach
from adapeft.selection import choose as choosing
from tests.adapeft.measure.shards.test_shards import assert_same, state_of
from tests.support.tiny import make_batches, make_bert, make_gpt2, make_t5


@pytest.mark.parametrize("method", ["adapeft", "sam", "random"])
def test_the_model_is_as_before(bert, method):
    bert.train()
    bert.bert.embeddings.requires_grad_(False)
    before = state_of(bert)
    subset = adapeft.select(bert, make_batches(bert), method=method, budget=100, warmup_steps=5)
    assert subset.count > 0
    assert_same(before, state_of(bert))
    assert all(parameter.grad is None for parameter in bert.parameters())


def test_the_verdict_on_a_language_model_knows_the_size_of_lora(bert):
    model, lora = make_gpt2(), {"method": "lora", "groups": "tensor"}
    subset = adapeft.select(model, make_batches(model), budget=2000)
    least = subset.choice.lora_from
    assert 0 < adapeft.select(model, make_batches(model), budget=least, **lora).count <= least
    assert adapeft.verdict_of(subset.choice).advice == "lora"
    assert adapeft.select(bert, make_batches(bert), budget=300).choice.lora_from is None


def test_a_draw_in_the_place_of_noise_is_told(bert, monkeypatch):
    monkeypatch.setattr(choosing, "reliability_of", lambda statistics, ranks: 0.04)
    with pytest.warns(UserWarning, match=r"mostly noise \(reliability 0.04 of 1\).*random draw.*fill=False") as said:
        drawn = adapeft.select(bert, make_batches(bert), budget=300, warmup_steps=0)
    assert said[0].filename == __file__
    assert adapeft.verdict_of(drawn.choice).advice == "drawn"
    chosen = adapeft.select(bert, make_batches(bert), budget=300, warmup_steps=0, fill=False)
    assert adapeft.verdict_of(chosen.choice).advice == "draw"
    assert chosen.choice.value > 0


def test_frozen_parameters_can_be_chosen(bert):
    free = adapeft.select(bert, make_batches(bert), budget=300, warmup_steps=4)
    frozen = adapeft.select(copy.deepcopy(bert).requires_grad_(False), make_batches(bert), budget=300, warmup_steps=4)
    assert repr(free.parts) == repr(frozen.parts)


def test_dropout_is_off(bert):
    quiet = copy.deepcopy(bert).eval()
    loud, calm = (adapeft.select(model.train(mode), make_batches(bert), budget=300, warmup_steps=4) for model, mode in
                  ((bert, True), (quiet, False)))  # fmt: skip
    assert loud.choice.value == calm.choice.value


def test_warm_up_moves_what_is_measured(bert):
    values = {
        steps: adapeft.select(bert, make_batches(bert), budget=300, warmup_steps=steps, fill=False).choice.value
        for steps in (0, 96, "auto")
    }
    assert values["auto"] == values[96] != values[0]


def test_reach(bert):
    def reach(**options):
        return adapeft.select(bert, make_batches(bert), budget=300, warmup_steps=4, **options).choice.reach

    assert reach(learning_rate=2e-3, num_steps=60) == planned_reach(0.12, 60)
    assert reach(reach=0.25) == 0.25
    assert reach(reach="inf") == "inf", "JSON knows no infinity"


def test_takes_any_iterable_of_batches(bert):
    loader = DataLoader(
        [{"input_ids": torch.full((6,), i), "labels": torch.tensor(i % 3)} for i in range(1, 13)], batch_size=4
    )
    assert adapeft.select(bert, loader, budget=100, warmup_steps=4).count <= 100
    assert adapeft.select(bert, iter(list(loader)), budget=100, warmup_steps=4).count <= 100


def test_include_and_exclude(bert):
    settings = {"groups": "element", "fill": False, "warmup_steps": 4}
    subset = adapeft.select(bert, make_batches(bert), budget=100, include=["*key*"], exclude="*.bias", **settings)
    assert subset.parts
    assert all("key.weight" in name for name in subset.parts)


def test_the_seed_samples_other_labels():
    model = make_gpt2()
    values = [
        adapeft.select(model, make_batches(model), budget=300, seed=seed, reach="inf", warmup_steps=4).choice.value
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]


def test_value_is_that_of_the_chosen_groups(bert):
    subset = adapeft.select(bert, make_batches(bert), budget=300, groups="row")
    groups = build_groups(bert, "row")
    chosen = chosen_of(groups, subset)
    assert chosen.sum() == subset.count
    assert subset.choice.num_chosen == (chosen > 0).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metod": "sam"}, "select.metod: unknown key. Did you mean 'select.method'"),
        ({"method": "smo"}, "select.method = smo: should be .*'sam'"),
        ({"groups": "rows"}, "select.groups = rows: .*Did you mean 'row'"),
        ({"budget": "lots"}, "select.budget = lots: write a fraction"),
        ({"budget": 10**9}, "more than the .* candidates"),
        ({"budget": 5, "groups": "row", "include": ["*word_embeddings*"]}, r"less than the cheapest row group \(12\)"),
        ({"include": "*qurey*"}, "select.include: the pattern .* matches no parameter.*query"),
        ({"exclude": "*"}, "leave no parameter to choose"),
        ({"reach": -1}, "select.reach = -1: should be"),
        ({"warmup_steps": -1}, "select.warmup_steps = -1: should be"),
    ],
)
def test_options_that_do_not_do(bert, options, message):
    with pytest.raises(AdapeftError, match=message):
        adapeft.select(bert, make_batches(bert), **options)


def test_one_batch_is_too_few(bert):
    for num_batches in (0, 1):
        with pytest.raises(AdapeftError, match=f"batches: {num_batches} given, but at least 2 are needed"):
            adapeft.select(bert, make_batches(bert)[:num_batches])


def test_batches_without_labels(bert):
    batches = [{"input_ids": batch["input_ids"]} for batch in make_batches(bert)]
    with pytest.raises(AdapeftError, match="a batch has no 'labels', only 'input_ids'"):
        adapeft.select(bert, batches)


MASKABLE = ["adapeft", "sam", "fish", "child-tuning-d"]


def masked(batch: dict, rows: slice = slice(None)) -> dict:
    labels = batch["labels"].clone()
    labels[rows] = -100
    return {**batch, "labels": labels}


def assert_same_choice(one, other):
    assert one.parts
    assert repr(one.parts) == repr(other.parts)
    assert one.choice.value == other.choice.value


OPTIONS = [
    *({"method": method} for method in MASKABLE),
    {"groups": "row"},
    {"probe_steps": 3, "probe_points": 2},
    {"groups": "role", "curvature": "parabola", "include": "*.att*", "budget": 600},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", [make_gpt2, make_bert])
def test_batches_without_a_prediction_have_no_weight(make, options):
    """They come last because the seed of sampled labels depends on the position of the example."""
    model = make()
    batches = make_batches(model)
    options = {"budget": 1500, "groups": "element", "warmup_steps": 4, **options}
    alone = adapeft.select(model, batches, **options)
    assert_same_choice(alone, adapeft.select(model, [*batches, masked(batches[0]), masked(batches[1])], **options))


@pytest.mark.parametrize("make", [make_gpt2, make_bert])
@pytest.mark.parametrize("method", ["fish", "sam"])
def test_examples_without_a_prediction_have_no_weight(make, method):
    model = make()
    batches = make_batches(model)
    kept = [{name: value[:3] for name, value in batch.items()} for batch in batches]
    hidden = [masked(batch, slice(3, None)) for batch in batches]
    first, second = (
        adapeft.select(model, given, method=method, budget=200, warmup_steps=0) for given in (kept, hidden)
    )
    assert first.parts.keys() == second.parts.keys()
    same = sum(len(set(p.indices.tolist()) & set(second.parts[n].indices.tolist())) for n, p in first.parts.items())
    assert same >= 199, "the last places may be exchanged by rounding"
    assert first.choice.value == pytest.approx(second.choice.value, rel=1e-5)


@pytest.mark.parametrize("method", MASKABLE)
@pytest.mark.parametrize("make", [make_gpt2, make_bert])
def test_a_calibration_without_predictions(make, method):
    model = make()
    batches = make_batches(model)
    for given in ([masked(batch) for batch in batches], [batches[0], *map(masked, batches[1:])]):
        if method == "fish" and given[0] is batches[0]:
            continue  # the examples of one batch make two halves
        with pytest.raises(AdapeftError, match="half A of the calibration contains no prediction"):
            adapeft.select(model, given, method=method, budget=100)


@pytest.mark.parametrize("method", MASKABLE)
@pytest.mark.parametrize(("make", "num_outputs"), [(make_gpt2, 29), (make_bert, 3), (make_t5, 29)])
@pytest.mark.parametrize("label", [-1, -99, -101, "num_outputs"])
def test_labels_outside_the_classes(make, num_outputs, label, method):
    model = make()
    batches = make_batches(model)
    value = num_outputs if label == "num_outputs" else label
    batches[3]["labels"][2, ...] = value
    said = rf"labels of batch 3 \(counted from 0\): {value} is outside the model's {num_outputs} outputs, 0 to"
    with pytest.raises(AdapeftError, match=said):
        adapeft.select(model, batches, method=method, budget=100)


def test_whole_numbers_of_any_type_are_classes(bert):
    batches = make_batches(bert)
    short = [{**batch, "labels": batch["labels"].to(torch.uint8)} for batch in batches]
    assert_same_choice(*(adapeft.select(bert, given, budget=200, warmup_steps=0) for given in (batches, short)))
