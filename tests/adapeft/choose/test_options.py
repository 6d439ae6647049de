"""Choosing rows, the whole tensor or LoRA for each matrix, against dense SVD and enumeration."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import adapeft
from adapeft.choose.joint import with_joint_value
from adapeft.choose.knapsack import parts_of
from adapeft.choose.options import choose_options, options_of
from adapeft.config.load import parse_select
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups, build_groups
from adapeft.measure.measure import measure
from adapeft.measure.options import Options, measure_with_options
from adapeft.measure.projections import measure_projections
from adapeft.measure.shards.shards import WholeModel
from adapeft.measure.statistics import Statistics
from adapeft.measure.storage import load_options, save_groups, save_options
from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.methods.registry import get_method
from adapeft.model.structure import ParameterInfo
from adapeft.parts.lora import Lora
from adapeft.parts.whole import Whole
from adapeft.selection.choose import choose
from adapeft.subset.subset import Subset
from tests.on_ranks.statistics import passes_for
from tests.oracles.measuring import gradients, num_predictions, sampled
from tests.support.tiny import make_batches, make_bert, make_gpt2

RANKS = (1, 2, 5)
MIXED = {"options": ["row", "tensor", "lora"], "lora_ranks": [1, 2, 3]}


@pytest.fixture(params=[make_bert, make_gpt2])
def measured(request):
    """Return the model, passes, groups, a direction, and the measured columns and options."""
    model = request.param().eval()
    groups = build_groups(model, "row")
    passes = passes_for(model, WholeModel(model, [info.name for info in groups.parameters]))
    torch.manual_seed(2)
    direction = [torch.randn(info.count) for info in groups.parameters]
    return model, passes, groups, direction, measure_with_options(passes, groups, direction, ("tensor", "lora"), RANKS)


def steps(groups, direction, options):
    """Yield each option's candidate and step, flat float64: the direction or its best approximation of a rank."""
    for index, rank in zip(options.parameters, options.ranks, strict=True):
        matrix = direction[index].view(groups.parameters[index].shape).double()
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        yield index, (matrix if rank == 0 else (u[:, :rank] * s[:rank]) @ vt[:rank]).flatten()


def test_slopes_and_curvatures_are_those_of_the_truncated_direction(measured):
    model, passes, groups, direction, (_, options) = measured
    batches = make_batches(model, num_batches=7)
    half_b, drawn = batches[3:], sampled(model, batches, passes.seed)[3:]
    of_step = lambda pieces: np.array(  # noqa: E731
        [float(pieces[index] @ step) for index, step in steps(groups, direction, options)]
    )
    weights = np.array([num_predictions(batch) for batch in half_b])
    slopes = weights @ np.stack([of_step(gradients(model, batch, groups)) for batch in half_b]) / weights.sum()
    np.testing.assert_allclose(options.slopes, slopes, rtol=1e-3, atol=1e-4)
    draws = [num_predictions(batch) * of_step(gradients(model, batch, groups)) ** 2 for batch in drawn]
    np.testing.assert_allclose(options.curvatures, np.mean(draws, axis=0), rtol=5e-3, atol=1e-4)


def test_every_matrix_has_its_options(measured):
    _, _, groups, _, (_, options) = measured
    for index, info in enumerate(groups.parameters):
        ranks = sorted(options.ranks[options.parameters == index].tolist())
        cheaper = [rank for rank in RANKS if rank * sum(info.shape) < info.count and rank < min(info.shape)]
        assert ranks == ([0] if groups.is_row[index] else []) + (cheaper if info.is_linear else [])
    linear = {info.name for info in groups.parameters if info.is_linear}
    assert linear
    assert not any("embeddings" in name or "wte" in name or "wpe" in name for name in linear), "only linear layers"
    costs = [groups.parameters[i].count if not r else r * sum(groups.parameters[i].shape)
             for i, r in zip(options.parameters, options.ranks, strict=True)]  # fmt: skip
    assert options.counts.tolist() == costs


def test_rows_are_measured_as_without_options(measured):
    _, passes, groups, direction, (columns, _) = measured
    for name, expected in measure_projections(passes, groups, direction).items():
        np.testing.assert_array_equal(columns[name], expected)


def test_a_mixed_choice_promises_what_its_step_does_as_a_whole(measured):
    """Oracle: the step of all parts at once, its slope, and its curvature from the gradients of all batches."""
    model, passes, groups, direction, (columns, options) = measured
    batches = make_batches(model, num_batches=7)
    half_b, drawn = batches[3:], sampled(model, batches, passes.seed)[3:]
    linear = [index for index, info in enumerate(groups.parameters) if info.is_linear]
    whole, low_rank, few = linear[0], linear[1], linear[2]
    vector = next(index for index in range(len(groups.parameters)) if not groups.is_row[index])
    rows = np.zeros(groups.num_groups, dtype=bool)
    rows[groups.span(few)][[1, 3]] = rows[groups.span(vector)] = True
    infos = groups.parameters
    parts = {
        **parts_of(groups, rows),
        infos[whole].name: Whole(infos[whole].shape),
        infos[low_rank].name: Lora(infos[low_rank].shape, infos[low_rank].output_dim, 2, 2.0),
    }
    step = {index: torch.zeros(info.count, dtype=torch.float64) for index, info in enumerate(infos)}
    of_options = {
        (index, rank): one for (index, one), rank in zip(steps(groups, direction, options), options.ranks, strict=True)
    }
    step[whole], step[low_rank] = of_options[whole, 0], of_options[low_rank, 2]
    step[vector] = direction[vector].double()
    along = torch.zeros(infos[few].shape, dtype=torch.float64)
    kept = torch.tensor([1, 3])
    matrix = direction[few].view(infos[few].shape).double()
    along.index_copy_(infos[few].output_dim, kept, matrix.index_select(infos[few].output_dim, kept))
    step[few] = along.flatten()

    def projected(batch):
        pieces = gradients(model, batch, groups)
        return sum(float(pieces[index].double() @ one) for index, one in step.items())

    weights = [num_predictions(batch) for batch in half_b]
    slope = np.average([projected(batch) for batch in half_b], weights=weights)
    curvature = np.mean([num_predictions(batch) * projected(batch) ** 2 for batch in drawn])
    statistics = Statistics(groups, columns, options=options)
    for sign in (1, -1):  # at least one of which is a descent
        for column in (columns["slope"], options.slopes):
            column *= sign
        for reach in (1e-3, 10.0):
            t = min(reach, max(sign * slope, 0.0) / curvature)
            found = with_joint_value(Subset(parts), statistics, reach).choice.joint_value
            assert found == pytest.approx(t * sign * slope - t**2 * curvature / 2, rel=1e-3, abs=1e-9)
        for column in (columns["slope"], options.slopes):
            column *= sign


def test_statistics_of_earlier_versions_have_no_joint_value(measured):
    _, _, groups, _, (columns, options) = measured
    subset = Subset({groups.parameters[0].name: Whole(groups.parameters[0].shape)})
    assert with_joint_value(subset, Statistics(groups, columns, options=options), 1.0).choice.joint_value is not None
    older = Statistics(groups, columns, options=replace(options, projections=None))
    assert with_joint_value(subset, older, 1.0).choice.joint_value is None
    del columns["projections"]
    assert with_joint_value(subset, Statistics(groups, columns), 1.0).choice.joint_value is None


def small(seed):
    """Return two matrices of three rows, a vector, and random values; small enough to enumerate."""
    draw = np.random.default_rng(seed)
    infos = (
        ParameterInfo("a", (3, 4), "a", 0, 0.0, 0, True),
        ParameterInfo("b", (4, 3), "b", 0, 0.0, 1, True),
        ParameterInfo("c", (5,), "c", 0, 0.0, None),
    )
    groups = Groups(infos, "row", 29)
    options = Options(
        parameters=np.array([0, 0, 1, 1]),
        ranks=np.array([0, 1, 0, 1]),
        counts=np.array([12, 7, 12, 7]),
        slopes=draw.random(4),
        curvatures=draw.random(4),
    )
    return groups, draw.random(7), options, draw.random(4) * 2


@pytest.mark.parametrize(
    "kinds", [("row", "tensor", "lora"), ("row", "lora"), ("tensor", "lora"), ("lora",)], ids="-".join
)
@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed, kinds):
    groups, values, options, option_values = small(seed)
    for budget in (4, 9, 15, 24, 29):
        subset = choose_options(groups, values, options, option_values, budget, kinds=kinds)
        best = max(worth for worth, cost in everything(groups, values, options, option_values, kinds) if cost <= budget)
        assert subset.count <= budget
        assert subset.choice.value == pytest.approx(best, rel=2e-4)
        assert subset.choice.bound >= best * (1 - 1e-9)
        chosen = options_of(groups, options, subset)
        assert set(chosen) <= {0, 7, 12}
        found = {name: part.kind for name, part in subset.parts.items()}
        assert "rows" not in found.values() or "row" in kinds
        assert "c" not in found or kinds != ("lora",), "a vector, which LoRA's learning rate does not suit"
        assert all((subset.parts[name].dim == 1) == (name == "b") for name in found if found[name] != "tensor")


def everything(groups, values, options, option_values, kinds):
    """Yield (value, cost) of all choices: per matrix any rows, or one option, and the vector or not."""
    per_matrix = []
    for index in (0, 1):
        rows = range(groups.span(index).start, groups.span(index).stop) if "row" in kinds else ()
        members = itertools.chain.from_iterable(itertools.combinations(rows, size) for size in range(len(rows) + 1))
        some = [(sum(values[list(chosen)]), sum(groups.counts[list(chosen)])) for chosen in members]
        own = np.flatnonzero(options.parameters == index)
        per_matrix.append(some + [(option_values[one], options.counts[one]) for one in own])
    vector = [(0.0, 0)] if kinds == ("lora",) else [(0.0, 0), (values[6], groups.counts[6])]
    for combination in itertools.product(*per_matrix, vector):
        yield sum(worth for worth, _ in combination), sum(cost for _, cost in combination)


def test_options_are_kept_on_disk(tmp_path, measured):
    _, _, groups, _, (columns, options) = measured
    save_groups(tmp_path, groups, columns, {})
    assert load_options(tmp_path, groups) is None
    save_options(tmp_path, groups, options, influence=options.slopes, chosen=options.counts)
    loaded = load_options(tmp_path, groups)
    for name in ("parameters", "ranks", "counts", "slopes", "curvatures", "projections"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(options, name))
    save_options(tmp_path, groups, replace(options, projections=None))
    assert load_options(tmp_path, groups).projections is None, "as earlier versions wrote them"
    others = build_groups(make_bert() if "transformer" in groups.parameters[0].name else make_gpt2(), "row")
    with pytest.raises(AdapeftError, match=r"options.parquet: damaged, or options of other groups"):
        load_options(tmp_path, others)


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_a_mixed_subset_is_chosen_trained_and_shipped(make, tmp_path):
    model = make().eval()
    batches = make_batches(model)
    subset = adapeft.select(model, batches, budget=900, learning_rate=3e-2, num_steps=20, warmup_steps=4, **MIXED)
    kinds = {part.kind for part in subset.parts.values()}
    assert len(kinds) > 1, "else nothing is mixed"
    assert subset.count <= 900
    subset.save(tmp_path / "subset.safetensors")
    subset = adapeft.Subset.load(tmp_path / "subset.safetensors")
    with torch.no_grad():
        before = model(**batches[0]).logits
        adapeft.attach(model, subset)
        torch.testing.assert_close(model(**batches[0]).logits, before, rtol=0, atol=0)
    optimizer = torch.optim.AdamW(adapeft.parameter_groups(model, 1e-2, 0.01))
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = adapeft.delta(model)
    fresh = make().eval()
    applied = delta.apply(fresh)
    with torch.no_grad():
        trained = model(**batches[0]).logits
        assert (trained - before).abs().max() > 1e-2
        torch.testing.assert_close(fresh(**batches[0]).logits, trained, rtol=1e-4, atol=1e-5)
        applied.revert()
        torch.testing.assert_close(fresh(**batches[0]).logits, before, rtol=0, atol=0)
        torch.testing.assert_close(adapeft.detach(model)(**batches[0]).logits.shape, before.shape)


def test_more_kinds_never_promise_less():
    model = make_gpt2().eval()
    groups = build_groups(model, "row")
    passes = passes_for(model, WholeModel(model, [info.name for info in groups.parameters]))
    values = {}
    for kinds in (["row"], ["lora"], ["row", "lora"], ["row", "tensor", "lora"]):
        settings = parse_select({"budget": 900, "options": kinds})
        statistics: Statistics = measure(get_method("adapeft"), passes, groups, settings)
        chosen = choose(settings, statistics, reach=0.3, seed=0, ranks=passes.shards.ranks)
        values[tuple(kinds)] = chosen.choice.value
    assert values["row", "lora"] >= max(values["row",], values["lora",]) * (1 - 1e-4)
    assert values["row", "tensor", "lora"] >= values["row", "lora"] * (1 - 1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({**MIXED, "method": "sam"}, "select.options = [row, tensor, lora]: is an option of method adapeft"),
        ({**MIXED, "groups": "tensor"}, "needs groups: row, but here adapeft chooses by tensor"),
        ({**MIXED, "joint": True}, "joint = true can only value groups of one kind"),
        ({**MIXED, "probe_steps": 3}, "probe_steps = 3 can only accumulate groups of one kind"),
        ({"lora_ranks": [3]}, "select.lora_ranks = [3]: lora is not among the options"),
        ({"options": ["column"]}, "select.options = [column]: should be 'row', 'tensor' or 'lora'"),
    ],
)
def test_keys_that_do_not_go_together(options, said):
    with pytest.raises(AdapeftError, match=re.escape(said)):
        adapeft.select(make_bert(), [], **options)
    assert AdaPEFTOptions.model_fields["options"].default == ()
