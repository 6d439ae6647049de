"""Tests of choosing for one model from statistics of another, by profiles over role and depth."""

from __future__ import annotations

from functools import partial
from operator import itemgetter

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import adapeft
from adapeft.config.load import parse_select
from adapeft.errors import AdapeftError
from adapeft.measure.direction import measure_direction
from adapeft.measure.exact.elementwise import mean_gradient
from adapeft.measure.groups import build_groups
from adapeft.measure.low_rank import elements as elements_of_low_rank
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.measure import measure, ready
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.registry import get_method
from adapeft.model.structure import describe_parameters
from adapeft.selection.choose import choose
from adapeft.transfer.transfer import Profiles, allot, fill, profiled_role, with_own_slopes
from adapeft.transfer.verify import agreement, uniform_subset
from tests.on_ranks.statistics import passes_for
from tests.support.tiny import make_bert, make_gpt2

REACH = 0.01
METHOD = get_method("adapeft")
LOW_RANK = {"measure": "low-rank", "rank": 3}
VALUE = partial(METHOD.value, reach=REACH)


def larger_bert(layers=5, hidden=24, intermediate=50):
    torch.manual_seed(1)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=41,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=3,
            intermediate_size=intermediate,
            max_position_embeddings=16,
            num_labels=3,
        )
    )
    model.config.architectures = ["BertModel"]
    return model


def measured(make, granularity, **options):
    model = make().eval()
    groups = build_groups(model, granularity)
    settings = parse_select({"groups": granularity, "warmup_steps": 3, **options})
    with seen(model, groups, METHOD.window_rank(groups, settings), seed=3) as view:
        shards = view.shards(WholeModel(model, view.names, groups.always_train))
        return measure(METHOD, passes_for(model, shards), groups, settings)


@pytest.mark.parametrize(
    ("granularity", "options"),
    [("tensor", {}), ("row", {}), ("element", {}), ("row", LOW_RANK), ("element", LOW_RANK)],
)
@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_a_transfer_to_the_same_model_is_the_choice_itself(make, granularity, options):
    """Cutting profiles blurs values within a tensor; between tensors nothing may be lost."""
    statistics = measured(make, granularity, **options)
    profiles = Profiles.of(statistics, VALUE)
    budget = 700
    allotment = allot(profiles, statistics.groups, budget)
    own = choose(
        parse_select({"groups": granularity, "budget": budget, "joint": False}),
        statistics,
        reach=REACH,
        seed=0,
        ranks=WholeModel(make(), []).ranks,
    )
    assert allotment.mapped == 1.0
    assert allotment.unmapped == ()
    assert allotment.value == pytest.approx(own.choice.value, rel=0.05)
    found = fill(statistics.groups, allotment, best_by_value(statistics))
    assert found.count <= budget
    assert agreement(statistics, METHOD, REACH, found, own).captured > 0.95
    if granularity == "tensor":
        assert found.parts.keys() == own.parts.keys()


def best_by_value(statistics):
    """Return scores that use the target's own values, so that the best of each tensor are taken."""
    groups = statistics.groups

    def scores(index):
        if groups.granularity == "element":
            (shard,) = [one for one in statistics.elements if one.slice.parameter == index]
            return METHOD.value(shard.columns, REACH)
        return torch.from_numpy(METHOD.values(statistics.columns, REACH)[groups.span(index)].copy())

    return scores


def with_slopes_of(make, granularity, curvatures):
    """Return statistics of a model that is measured only for its slopes."""
    model = make().eval()
    groups = build_groups(model, granularity)
    shards = WholeModel(model, [info.name for info in groups.parameters], groups.always_train)
    passes = ready(METHOD, passes_for(model, shards), groups, parse_select({"groups": granularity, "warmup_steps": 3}))
    passes.warm_up(passes.calibration.half_a)
    direction = measure_direction(passes, "adam")
    passes.warm_up(passes.calibration.half_b)
    gradient = mean_gradient(passes, "slope", passes.calibration.half_b)
    slopes = [slope * along for slope, along in zip(gradient, direction, strict=True)]
    return with_own_slopes(curvatures, shards, groups, slopes)


@pytest.mark.parametrize("granularity", ["tensor", "row", "element"])
def test_own_slopes_with_the_same_models_curvature_choose_as_it_does(granularity):
    """The choice of tensors is equal up to rounding; within a tensor all elements have its mean curvature."""
    statistics = measured(make_bert, granularity)
    found = with_slopes_of(make_bert, granularity, Profiles.of(statistics, itemgetter("curvature")))
    np.testing.assert_allclose(found.columns["slope"], statistics.columns["slope"], rtol=1e-3, atol=1e-9)
    if granularity == "tensor":
        np.testing.assert_allclose(found.columns["curvature"], statistics.columns["curvature"], rtol=1e-4)
    settings = parse_select({"groups": granularity, "budget": 700})
    subset, own = (
        choose(settings, one, reach=REACH, seed=0, ranks=WholeModel(make_bert(), []).ranks)
        for one in (found, statistics)
    )
    assert agreement(statistics, METHOD, REACH, subset, own).captured > 0.97
    if granularity == "tensor":
        assert subset.parts.keys() == own.parts.keys()


def test_what_has_no_counterpart_has_no_slope():
    profiles = Profiles.of(measured(make_bert, "row"), itemgetter("curvature"))
    known = {role: curve for role, curve in profiles.roles.items() if "LayerNorm" not in role}
    found = with_slopes_of(make_bert, "row", Profiles("row", known))
    for index, info in enumerate(found.groups.parameters):
        slopes = found.columns["slope"][found.groups.span(index)]
        assert (np.abs(slopes) > 0).any() != ("LayerNorm" in info.name)


def test_values_of_a_tensor_are_conserved_whatever_its_size():
    statistics = measured(make_bert, "row")
    profiles = Profiles.of(statistics, VALUE)
    values = METHOD.values(statistics.columns, REACH)
    for index, info in enumerate(statistics.groups.parameters):
        total = values[statistics.groups.span(index)].sum()
        assert profiles.at(info)[-1] * info.count == pytest.approx(total, rel=1e-9, abs=1e-15)


def values_of_factors(statistics):
    """Return the value of every element of each candidate, flat float64, with whole matrices from their factors."""
    found = [torch.full((info.count,), torch.nan, dtype=torch.float64) for info in statistics.groups.parameters]
    for shard in statistics.elements:
        own = {name: tensor.double() for name, tensor in shard.tensors.items()}
        if shard.is_factored:
            products = (own[f"{of}_rows"] @ own[f"{of}_columns"].T for of in ("step", "gradient", "moment"))
            step, gradient, moment = products
            is_turned = statistics.groups.parameters[shard.slice.parameter].output_dim == 1
            own = {
                name: (matrix.T if is_turned else matrix).flatten()
                for name, matrix in (("slope", gradient * step), ("curvature", moment * step**2))
            }
        place = slice(shard.slice.start, shard.slice.start + shard.slice.length)
        found[shard.slice.parameter][place] = VALUE(own)
    assert not any(values.isnan().any() for values in found)
    return found


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("granularity", ["row", "element"])
def test_profiles_of_low_rank_statistics_are_those_of_dense_columns(make, granularity, monkeypatch):
    monkeypatch.setattr(elements_of_low_rank, "_LARGEST", 60)  # so that matrices have several shards
    statistics = measured(make, granularity, **LOW_RANK)
    groups = statistics.groups
    if granularity == "element":
        assert len(statistics.elements) > len(groups.parameters)
        assert any(shard.is_factored for shard in statistics.elements)
        values = values_of_factors(statistics)
    else:
        of_groups = torch.from_numpy(METHOD.values(statistics.columns, REACH))
        values = [of_groups[groups.span(index)] for index in range(len(groups.parameters))]
    profiles = Profiles.of(statistics, VALUE)
    assert profiles.roles.keys() == {profiled_role(info) for info in groups.parameters}
    for info, own in zip(groups.parameters, values, strict=True):
        best_first = np.concatenate([[0.0], own.sort(descending=True).values.cumsum(0).numpy()]) / info.count
        curve = profiles.at(info)
        expected = np.interp(np.linspace(0, 1, len(curve)), np.linspace(0, 1, len(best_first)), best_first)
        np.testing.assert_allclose(curve, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_densities_are_interpolated_over_relative_depth():
    statistics = measured(make_bert, "tensor")
    profiles = Profiles.of(statistics, VALUE)
    values = dict(
        zip([info.name for info in statistics.groups.parameters], METHOD.values(statistics.columns, REACH), strict=True)
    )
    target = {info.name: info for info in describe_parameters(larger_bert(layers=5))}
    role = "bert.encoder.layer.{}.output.dense.weight"
    low, high = (values[role.format(layer)] / (12 * 19) for layer in (0, 1))
    for layer in range(5):
        found = profiles.at(target[role.format(layer)])[-1]
        assert found == pytest.approx(low + (high - low) * layer / 4, rel=1e-9)


@pytest.mark.parametrize("granularity", ["tensor", "row", "element"])
def test_a_larger_target_gets_a_subset_that_can_be_trained(granularity, tmp_path):
    profiles = Profiles.of(measured(make_bert, granularity), VALUE)
    model = larger_bert()
    with torch.device("meta"):
        structure = BertForSequenceClassification(model.config)
    groups = build_groups(structure, granularity)
    allotment = allot(profiles, groups, 2000)
    assert allotment.value <= allotment.bound * (1 + 1e-9)
    weights = [model.get_parameter(info.name).detach() for info in groups.parameters]

    def scores(index):
        squares = weights[index].square().flatten()
        return squares if granularity == "element" else groups.sums(index, 0, squares)[1]

    subset = fill(groups, allotment, scores)
    assert 0 < subset.count <= 2000
    subset.save(tmp_path / "subset.safetensors")
    adapeft.attach(model, adapeft.Subset.load(tmp_path / "subset.safetensors"))
    assert uniform_subset(groups, 2000, scores).count <= 2000 if granularity != "tensor" else True
    for index, info in enumerate(groups.parameters):
        part = subset.parts.get(info.name)
        if part is not None and part.kind == "rows":
            norms = scores(index)
            chosen = norms[part.indices]
            rest = np.delete(norms.numpy(), part.indices.numpy())
            assert len(rest) == 0 or float(chosen.min()) >= rest.max(), "the rows of largest norm"


def test_roles_are_counted_once_for_all_their_tensors():
    groups = build_groups(larger_bert(), "role")
    choice = fill(groups, allot(Profiles.of(measured(make_bert, "role"), VALUE), groups, 10**6), None).choice
    assert 0 < choice.num_chosen <= choice.num_groups < len(groups.parameters)


def test_rows_without_weights_are_refused():
    profiles = Profiles.of(measured(make_bert, "row"), VALUE)
    groups = build_groups(larger_bert(), "row")
    with pytest.raises(AdapeftError, match=r"depends on the target's weights.*set groups: tensor"):
        fill(groups, allot(profiles, groups, 2000), None)


def test_strangers_are_refused():
    profiles = Profiles.of(measured(make_bert, "tensor"), VALUE)
    with pytest.raises(AdapeftError, match=r"only 0% of the target's parameters have a counterpart.*'transformer\.wte"):
        allot(profiles, build_groups(make_gpt2(), "tensor"), 100)


def test_what_has_no_counterpart_is_named_and_left_frozen():
    profiles = Profiles.of(measured(make_bert, "tensor"), VALUE)
    known = {role: curve for role, curve in profiles.roles.items() if "LayerNorm" not in role}
    groups = build_groups(larger_bert(), "tensor")
    allotment = allot(Profiles("tensor", known), groups, 100_000)
    assert all("LayerNorm" in role for role in allotment.unmapped)
    assert 0.9 < allotment.mapped < 1
    assert not any("LayerNorm" in name for name in fill(groups, allotment, None).parts)


def test_roles_keep_their_block_list():
    infos = {info.name: info for info in describe_parameters(make_bert())}
    assert (
        profiled_role(infos["bert.encoder.layer.1.output.dense.weight"]) == "bert.encoder.layer.*.output.dense.weight"
    )
    assert profiled_role(infos["bert.pooler.dense.weight"]) == "bert.pooler.dense.weight"
