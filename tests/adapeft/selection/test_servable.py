"""``select.servable``: every choice can be exported for vLLM and SGLang; what could not be is refused beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import adapeft
from adapeft import AdapeftError
from adapeft.choose.joint import choose_groups_jointly
from adapeft.choose.knapsack import choose_groups
from adapeft.choose.options import choose_options
from adapeft.config.keys import measured_differently, measurement_key
from adapeft.config.load import parse_config, parse_select
from adapeft.formats.peft.folder import save_for_peft
from adapeft.measure.groups import Groups, build_groups
from adapeft.measure.options import Options
from adapeft.measure.statistics import Statistics
from adapeft.methods.base import method as base_method
from adapeft.methods.lora import method as lora_method
from adapeft.model.structure import ParameterInfo
from adapeft.parts.part import Part
from adapeft.ranks import OneRank
from adapeft.selection.choose import choose
from adapeft.servers import LAYERS
from tests.oracles.merged import random_delta, save_base
from tests.oracles.parts import make_llama
from tests.support.tiny import make_batches, make_bert, make_gpt2

CHOICES = {
    "rows": {"warmup_steps": 0},
    "jointly": {"joint": True},
    "low rank": {"measure": "low-rank", "rank": 4},
    "rows or LoRA": {"options": ["row", "lora"], "lora_ranks": [1, 2]},
    "LoRA or nothing": {"options": ["lora"], "lora_ranks": [1, 2]},
    "drawn rows": {"method": "random", "groups": "row"},
    "magnitude": {"method": "magnitude", "groups": "row"},
    "SAM": {"method": "sam", "groups": "row"},
    "LoRA": {"method": "lora", "groups": "auto"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_chosen_is_exported(name, tmp_path):
    model, options = make_llama(), CHOICES[name]
    subset = adapeft.select(model, make_batches(model), budget="30%", servable=True, **options)
    assert subset.parts
    assert all(parameter.split(".")[-2] in LAYERS for parameter in subset.parts)
    base = save_base(make_llama(), tmp_path / "base")
    save_for_peft(random_delta(make_llama(), subset.parts), base, tmp_path / "out", servable=True)


@pytest.mark.parametrize("name", [name for name in CHOICES if "LoRA" not in name])
def test_without_the_key_it_would_not_be(name, tmp_path):
    model, options = make_llama(), {"groups": "row", **CHOICES[name]}
    subset = adapeft.select(model, make_batches(model), budget="30%", **options)
    base = save_base(make_llama(), tmp_path / "base")
    with pytest.raises(AdapeftError, match=r"Choose with select\.servable: true"):
        save_for_peft(random_delta(make_llama(), subset.parts), base, tmp_path / "out", servable=True)


MATRICES = (ParameterInfo("a", (6, 5), "a", 0, 0.0, 0), ParameterInfo("b", (4, 3), "b", 1, 1.0, 0))
"""Two matrices whose rows cost 5 and 3."""


def ranks_of(parts: dict[str, Part]) -> dict[str, int]:
    """Return the rank of each part as LoRA."""
    return {name: getattr(part, "rank", None) or len(part.indices) for name, part in parts.items()}


@pytest.mark.parametrize("seed", range(5))
def test_the_best_rows_within_the_rank(seed):
    """Against brute force over how many of each matrix's best rows are chosen."""
    groups = Groups(MATRICES, "row", 42)
    values = np.random.default_rng(seed).exponential(size=10)
    subset = choose_groups(groups, values, 20, most_rows=2)
    best = [np.sort(part)[::-1] for part in np.split(values, [6])]
    expected = max(best[0][:a].sum() + best[1][:b].sum() for a in range(3) for b in range(3) if 5 * a + 3 * b <= 20)
    assert max(ranks_of(subset.parts).values()) <= 2
    assert subset.choice.value == pytest.approx(expected, rel=1e-9)
    assert choose_groups(groups, values, 42).count == 42


def test_other_solvers_keep_the_rank():
    groups, generator = Groups(MATRICES, "row", 42), np.random.default_rng(0)
    values, projections = generator.exponential(size=10), 0.1 * generator.normal(size=(10, 3))
    columns = {"slope": values, "curvature": (projections**2).sum(1), "projections": projections}
    jointly = choose_groups_jointly(groups, columns, 42, 1.0, most_rows=2)
    assert ranks_of(jointly.parts) == {"a": 2, "b": 2}
    one = np.array([1], dtype=np.int64)
    option = Options(np.array([0]), 2 * one, 22 * one, one * 1.0, one * 1.0)
    mixed = choose_options(groups, values, option, np.array([100.0]), 42, kinds=("row", "lora"), most_rows=2)
    assert {name: part.kind for name, part in mixed.parts.items()} == {"a": "lora", "b": "rows"}
    assert ranks_of(mixed.parts) == {"a": 2, "b": 2}


def test_draws_and_lora_keep_the_rank(monkeypatch):
    monkeypatch.setattr(base_method, "MAX_RANK", 2)
    monkeypatch.setattr(lora_method, "MAX_RANK", 2)
    linear = tuple(
        ParameterInfo(info.name, info.shape, info.role, info.layer, info.depth, 0, is_linear=True) for info in MATRICES
    )
    for method, all_of_it in (("random", {"a": 6, "b": 4}), ("lora", {"a": 5, "b": 3})):
        found = {}
        for servable in (True, False):
            keys = {"method": method, "budget": 42 if method == "random" else 1000, "servable": servable}
            settings = parse_select({**keys, "groups": "row" if method == "random" else "auto"})
            groups = Groups(linear, settings.granularity, 42)
            subset = choose(settings, Statistics(groups, {}), reach=1.0, seed=0, ranks=OneRank())
            found[servable] = ranks_of(subset.parts)
        assert found == {True: {"a": 2, "b": 2}, False: all_of_it}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"groups": "tensor"},
            "servable = true: adapeft trains by tensor, but vLLM and SGLang load only rows and LoRA",
        ),
        ({"method": "random"}, "random trains by element"),
        ({"method": "bitfit"}, "bitfit trains by tensor"),
        ({"method": "adapter"}, "adapter trains by tensor"),
        ({"method": "mixout"}, "mixout trains by element"),
        ({"options": ["row", "tensor"]}, r"options = \['row', 'tensor'\] can train a matrix whole"),
        ({"options": ["lora"], "lora_ranks": [1, 512]}, r"lora_ranks = \[1, 512\], but .* of rank 256 at most"),
    ],
)
def test_choices_that_are_refused(options, message):
    with pytest.raises(AdapeftError, match=message):
        parse_select({**options, "servable": True})
    parse_select(options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_bert, {}, r"2 parameters such as 'classifier\.bias' are new or in select\.always_train"),
        (make_llama, {"always_train": ["lm_head.weight"]}, r"such as 'lm_head\.weight' are new or in"),
        (make_gpt2, {}, "no candidate is a linear layer on which vLLM and SGLang serve LoRA"),
        (make_llama, {"include": ["*norm*"]}, "no candidate is a linear layer"),
    ],
)
def test_models_that_are_refused(make, options, message):
    with pytest.raises(AdapeftError, match=message):
        build_groups(make(), "row", servable=True, **options)


def test_a_quantized_base_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from tests.support.quantized import load_quantized

    with pytest.raises(AdapeftError, match=r"the base is quantized \('model\.layers\.0\.self_attn\.q_proj\.weight' to"):
        build_groups(load_quantized(make_llama, "nf4", tmp_path), "row", servable=True)


def test_layers_that_only_a_pattern_could_name_are_left_out():
    class Two(LlamaForCausalLM):
        """A model that has another one inside, whose paths end like its own."""

    model = Two(make_llama().config)
    model.config.architectures = ["Two"]
    model.inner = torch.nn.Module()
    model.inner.model = make_llama().model
    names = {info.name for info in build_groups(model, "row", servable=True).parameters}
    assert names
    assert all(name.startswith("inner.") for name in names)


def test_a_chosen_subset_and_the_key_are_refused_together():
    tree = {
        "model": {"name": "m", "task": "causal-lm"},
        "data": {"train": "t", "evaluation": "e"},
        "output": "o",
        "select": {"servable": True},
    }
    assert parse_config(tree).select.servable
    with pytest.raises(AdapeftError, match=r"select\.servable = true: .* but train\.subset = s is chosen already"):
        parse_config({**tree, "train": {"subset": "s"}})


def test_statistics_of_other_candidates_are_not_reused():
    tree = {"model": {"name": "m", "task": "causal-lm"}, "data": {"train": "t", "evaluation": "e"}, "output": "o"}
    plain, servable = (
        parse_config({**tree, "select": {"groups": "row", "servable": value}}) for value in (False, True)
    )
    assert "select.servable" not in measurement_key(plain)  # like those of versions without the key
    assert measured_differently(measurement_key(servable), measurement_key(servable)) == []
    for here, there, said in (
        (servable, plain, "select.servable: true here, false there"),
        (plain, servable, "select.servable: false here, true there"),
    ):
        assert measured_differently(measurement_key(here), measurement_key(there)) == [said]
