"""The procedure of the AdaPEFT paper: parabolas through displaced losses, and influence summed along a probe."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import adapeft
from adapeft.config.load import parse_select
from adapeft.errors import AdapeftError
from adapeft.measure.direction import measure_direction
from adapeft.measure.exact import parabola
from adapeft.measure.exact.parabola import fit_parabolas, measure_parabolas
from adapeft.measure.groups import build_groups
from adapeft.measure.measure import measure
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.registry import get_method
from tests.adapeft.measure.shards.test_shards import assert_same, state_of
from tests.on_ranks.statistics import passes_for
from tests.oracles.measuring import group_of_elements, in_double, num_predictions
from tests.support.tiny import make_batches, make_bert, make_gpt2


def set_up(model, granularity):
    groups = build_groups(model, granularity)
    shards = WholeModel(model, [info.name for info in groups.parameters], groups.always_train)
    return passes_for(model, shards), groups


def exact_forms(model, groups, direction):
    """Return (gᵀd, dᵀHd) of every group over half B by double backward, float64 [K]."""
    batches = make_batches(model, num_batches=7)[3:]
    counts = [num_predictions(batch) for batch in batches]
    losses = [model(**batch).loss * count / sum(counts) for batch, count in zip(batches, counts, strict=True)]
    weights = [model.get_parameter(info.name) for info in groups.parameters]
    gradients = torch.autograd.grad(sum(losses), weights, create_graph=True)
    slopes = torch.zeros(groups.num_groups, dtype=torch.float64)
    curvatures = torch.zeros_like(slopes)
    of = [int(elements[0]) for elements in group_of_elements(groups)]
    for group in range(groups.num_groups):
        members = [index for index, own in enumerate(of) if own == group]
        along = [direction[index].double().view_as(weights[index]) for index in members]
        slope = sum((gradients[index] * d).sum() for index, d in zip(members, along, strict=True))
        curved = torch.autograd.grad(slope, [weights[index] for index in members], retain_graph=True)
        slopes[group] = slope.detach()
        curvatures[group] = sum((h * d).sum() for h, d in zip(curved, along, strict=True))
    return slopes.numpy(), curvatures.numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "granularity"),
    [
        (make_gpt2, "role"),
        *(pytest.param(make_bert, granularity, marks=pytest.mark.slow) for granularity in ("tensor", "role")),
    ],
)
def test_parabolas_are_gradient_and_hessian_to_second_order(make, granularity, monkeypatch):
    model = in_double(make())
    model.set_attn_implementation("eager")  # the fused kernel has no second derivative
    passes, groups = set_up(model, granularity)
    torch.manual_seed(2)
    direction = [torch.randn(info.count) for info in groups.parameters]
    slopes, curvatures = exact_forms(model, groups, direction)
    before = copy.deepcopy(model.state_dict())
    errors = {}
    for step in (4e-3, 2e-3):
        monkeypatch.setattr(parabola, "STEP", step)
        found = measure_parabolas(passes, groups, direction)
        kept = found["slope"] != 0
        errors[step] = (
            np.abs(found["curvature"] - curvatures).max() / np.abs(curvatures).max(),
            np.abs(found["slope"] - slopes)[kept].max() / np.abs(slopes).max(),
        )
    for at_once, halved in zip(errors[4e-3], errors[2e-3], strict=True):
        assert halved < 2e-3
        assert halved == pytest.approx(at_once / 4, rel=0.2), "the error is of second order"
    # Fits that are not convex are discarded; softmax is invariant to the bias of attention keys: no curvature at all.
    assert (kept == (curvatures > 1e-12)).all()
    assert 0 < kept.sum() < groups.num_groups
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bad_fits_count_nothing():
    x = np.array([0.0, -2, -1, 1, 2])
    fine, concave, noise, flat = 3 - 2 * x + x**2, 3 - 2 * x - x**2, np.array([0.0, 1, -1, 1, -1]), np.ones(5)
    slope, curvature, r2 = fit_parabolas(np.stack([fine, concave, noise, flat]), np.tile(x, (4, 1)))
    np.testing.assert_allclose(slope[:2], 2)
    np.testing.assert_allclose(curvature[:2], [2, -2])
    np.testing.assert_allclose(r2[[0, 1, 3]], [1, 1, 0])
    assert r2[2] < parabola.LEAST_R2
    still = fit_parabolas(np.ones((1, 5)), np.zeros((1, 5)))
    assert np.array(still).tolist() == [[0.0]] * 3


def test_the_table_says_which_fits_were_discarded():
    passes, groups = set_up(make_bert().eval(), "role")
    settings = parse_select({"groups": "role", "curvature": "parabola"})
    columns = get_method("adapeft").measure(passes, groups, settings).columns
    discarded = (columns["curvature"] <= 0) | (columns["r2"] < parabola.LEAST_R2)
    assert discarded.any()
    assert (columns["slope"][discarded] == 0).all()
    assert (columns["slope"] != 0).any()


def test_a_line_has_no_curvature_to_divide_by(monkeypatch):
    model = make_bert().eval()
    passes, groups = set_up(model, "tensor")
    everything = lambda: sum(float(p.detach().double().sum()) for p in model.parameters())  # noqa: E731
    start = everything()
    monkeypatch.setattr(type(passes), "loss", lambda *_: float(np.float32(0.7 + 1e-3 * (everything() - start))))
    columns = measure_parabolas(passes, groups, [torch.ones(info.count) for info in groups.parameters])
    assert (columns["r2"] > parabola.LEAST_R2).all()
    assert (columns["curvature"] > 0).any()
    assert (columns["slope"] == 0).all()


FAITHFUL = {
    "groups": "role",
    "solver": "greedy",
    "reach": "inf",
    "curvature": "parabola",
    "probe_steps": 3,
    "probe_points": 2,
    "warmup_steps": 2,
    "include": "*.att*",
}


@pytest.mark.parametrize(
    "options",
    [
        FAITHFUL,
        pytest.param(
            {"curvature": "parabola", "groups": "tensor", "include": "*.att*", "warmup_steps": 2},
            marks=pytest.mark.slow,
        ),
        {"probe_steps": 2, "probe_points": 3, "groups": "element", "warmup_steps": 2},
        {"groups": "role", "joint": True, "warmup_steps": 2},
    ],
)
def test_select_leaves_the_model_alone(bert, options):
    before = state_of(bert)
    subset = adapeft.select(bert, make_batches(bert), budget=600, **options)
    assert 0 < subset.count <= 600
    assert subset.choice.value > 0
    assert_same(before, state_of(bert))
    assert repr(adapeft.select(bert, make_batches(bert), budget=600, **options).parts) == repr(subset.parts)


def trained(model, passes, settings):
    """Return a copy of ``model`` after the probe's steps in plain torch."""
    model = copy.deepcopy(model).requires_grad_(True)
    head = list(model.classifier.parameters())
    body = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
    rate = settings.probe_learning_rate
    optimizers = [torch.optim.Adam(body, lr=rate), torch.optim.AdamW(head, lr=rate, weight_decay=0.0)]
    for step in range(settings.probe_steps):
        batch = passes.collate(passes.calibration.half_a[step % len(passes.calibration.half_a)])
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(**batch.inputs, labels=batch.labels).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_two_points_are_two_models_measured_apart(granularity):
    model = make_bert().eval()
    options = {"groups": granularity, "warmup_steps": 0}
    plain = parse_select(options)
    probing = parse_select({**options, "probe_steps": 5, "probe_points": 2, "probe_learning_rate": 1e-2})
    method = get_method("adapeft")
    passes, groups = set_up(model, granularity)
    apart = []
    for each in (model, trained(model, passes, probing)):
        apart.append(method.measure(set_up(each, granularity)[0], groups, plain))
    before = [p.detach().clone() for name, p in model.named_parameters() if name not in groups.always_train]
    along = measure(method, passes, groups, probing)
    after = [p for name, p in model.named_parameters() if name not in groups.always_train]
    assert all(map(torch.equal, before, after))

    for point, alone in enumerate(apart):
        for name, stacked in along.columns.items():
            column = alone.columns[name]
            np.testing.assert_allclose(stacked[:, point], column, rtol=1e-2, atol=1e-3 * np.abs(column).max())
    assert np.abs(np.subtract(*(each.columns["slope"] for each in apart))).max() > 0.1, "the probe moves"
    reach = 0.01
    expected = np.mean([method.group_values(alone, reach) for alone in apart], axis=0)
    np.testing.assert_allclose(method.group_values(along, reach), expected, rtol=1e-2, atol=1e-3 * expected.max())
    for shard, *alone in zip(along.elements, *(each.elements for each in apart), strict=True):
        values = torch.stack([method.value(each.columns, reach) for each in alone]).mean(0)
        torch.testing.assert_close(
            method.value(shard.columns, reach), values, rtol=1e-2, atol=1e-3 * float(values.max())
        )


def test_the_first_point_is_the_start():
    passes, groups = set_up(make_bert().eval(), "tensor")
    probing = parse_select({"groups": "tensor", "probe_steps": 1, "probe_points": 2, "warmup_steps": 0})
    start = measure(get_method("adapeft"), passes, groups, parse_select({"groups": "tensor", "warmup_steps": 0}))
    along = measure(get_method("adapeft"), passes, groups, probing)
    assert start.columns.keys() - along.columns.keys() == {"projections"}, "there are no cross terms along a probe"
    for name, stacked in along.columns.items():
        np.testing.assert_array_equal(stacked[:, 0], start.columns[name])


def test_the_direction_is_measured_anew_at_every_point(monkeypatch):
    passes, groups = set_up(make_bert().eval(), "tensor")
    directions = []

    def measured(passes, direction):
        found = measure_direction(passes, direction)
        directions.append(torch.cat(found))
        return found

    monkeypatch.setattr("adapeft.methods.adapeft.method.measure_direction", measured)
    probing = parse_select({"groups": "tensor", "probe_steps": 4, "probe_points": 3, "warmup_steps": 0})
    measure(get_method("adapeft"), passes, groups, probing)
    assert len(directions) == 3
    assert not torch.equal(directions[0], directions[1])
    assert not torch.equal(directions[1], directions[2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"curvature": "parabola"}, r"curvature = parabola: 4K \+ 1 forward passes .* too many by element"),
        ({"curvature": "parabola", "groups": "element"}, "too many by element; set groups: tensor or role"),
        (
            {"curvature": "parabola", "method": "sam", "groups": "tensor"},
            "curvature = parabola: is an option of method adapeft",
        ),
        ({"curvature": "parabola", "groups": "role", "joint": True}, "gives no cross terms for joint = true"),
        ({"probe_steps": 3, "method": "fish"}, "probe_steps = 3: is an option of method adapeft"),
        ({"probe_steps": 9, "joint": True}, "probe_steps = 9: cross terms do not add up"),
        ({"probe_steps": 2}, "probe_points = 4: 2 steps have 3 points"),
        ({"probe_points": 3}, "probe_points = 3: there is no probe"),
        ({"probe_learning_rate": 1e-3}, "probe_learning_rate = 0.001: there is no probe"),
    ],
)
def test_keys_that_do_not_go_together(options, said):
    with pytest.raises(AdapeftError, match=said):
        parse_select(options)


@pytest.mark.parametrize("options", [{"curvature": "parabola", "groups": "role"}, {"probe_steps": 5}])
def test_bfloat16_is_too_coarse(bert, options):
    with pytest.raises(AdapeftError, match=r"model\.dtype = bfloat16 is too coarse .* that select\."):
        adapeft.select(bert.bfloat16(), make_batches(bert), budget=700, **options)
