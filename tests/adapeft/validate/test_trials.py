"""Tests of random subsets, the predictions of estimators for them, and the gain of training them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapeft.data.batches import Calibration
from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.measure.direction import measure_direction
from adapeft.measure.groups import build_groups
from adapeft.measure.mode import measuring_mode
from adapeft.measure.passes import Passes
from adapeft.measure.projections import measure_projections
from adapeft.measure.shards.shards import WholeModel
from adapeft.tasks.inference import infer_objective
from adapeft.tasks.losses.squared_error import Regression
from adapeft.validate.correlation import correlate, fit_constant
from adapeft.validate.draw import draw_subsets, subset_of_draw
from adapeft.validate.estimators import measure_estimators, sums
from adapeft.validate.outcome import Trial
from tests.oracles.measuring import in_double, mean_gradients
from tests.support.tiny import make_batches, make_bert

SIZES = (0.05, 0.5)


class Bench:
    """A tiny model measured on its own batches, each batch one 'example' of the calibration."""

    def __init__(self, granularity: str) -> None:
        self.model = make_bert()
        self.batches = make_batches(self.model)
        examples, seen = [], 0
        for batch in self.batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            examples.append(Batch(inputs, batch["labels"], torch.arange(seen, seen + len(batch["labels"]))))
            seen += len(batch["labels"])
        order = tuple(np.array([index]) for index in range(len(examples)))
        self.order, self.collate = order, lambda indices: examples[int(indices[0])]
        self.groups = build_groups(self.model, granularity)
        self.draws = draw_subsets(self.groups, SIZES, 4, 5, seed=0)
        names = [info.name for info in self.groups.parameters]
        self.shards = WholeModel(self.model, names, self.groups.always_train)
        self.objective = infer_objective(self.model, examples[0].labels)
        self.passes = Passes(self.shards, self.objective, Calibration(order[:3], order[3:]), self.collate, 0)
        with measuring_mode(self.model, restore=()):
            before = copy.deepcopy(self.model.state_dict())
            self.measured = measure_estimators(self.model, self.passes, self.groups, self.draws, self.passes)
            after = self.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before), "measuring leaves the weights alone"


@pytest.fixture(scope="module", params=["tensor", "row", "element"])
def bench(request):
    return Bench(request.param)


def test_draws_have_their_size_and_come_again(bench):
    total = sum(info.count for info in bench.groups.parameters)
    assert [draw.size for draw in bench.draws] == [0.05] * 4 + [0.5] * 4 + [0.0] * 5
    for draw in bench.draws:
        subset = subset_of_draw(bench.groups, draw)
        assert subset.count == draw.count
        if draw.size and bench.groups.granularity == "element":
            assert draw.count == round(draw.size * total)
        if draw.size and bench.groups.granularity == "row":
            assert draw.count <= draw.size * total or sum(len(units) for units in draw.units.values()) == 1
        if not draw.size:
            (name,) = subset.parts
            assert draw.count == bench.model.get_parameter(name).numel(), "all groups of one tensor"
    again = draw_subsets(bench.groups, SIZES, 4, 5, seed=0)
    other = draw_subsets(bench.groups, SIZES, 4, 5, seed=1)
    assert _same(bench.draws, again)
    assert not _same(bench.draws, other)


def test_first_order_is_the_dense_product(bench):
    batches = [bench.batches[int(index[0])] for index in bench.passes.calibration.half_b]
    gradients = mean_gradients(bench.model, batches, bench.groups)
    for name in ("adam", "gradient"):
        with measuring_mode(bench.model, restore=()):
            direction = measure_direction(bench.passes, name)
        products = [g * d.double() for g, d in zip(gradients, direction, strict=True)]
        found = bench.measured.predictions(bench.draws, 1.0)[f"first order ({name})"]
        expected = [_total(bench, products, draw) for draw in bench.draws]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_joint_curvature_of_one_group_is_its_own(bench):
    if bench.groups.granularity == "element":
        pytest.skip("a draw of one element is none of these")
    with measuring_mode(bench.model, restore=()):
        direction = measure_direction(bench.passes, "adam")
        columns = measure_projections(bench.passes, bench.groups, direction)
    along = bench.measured.along["adam"]
    np.testing.assert_allclose(torch.cat(along.slope).numpy(), columns["slope"], rtol=1e-5)
    np.testing.assert_allclose(torch.cat(along.curvature).numpy(), columns["curvature"], rtol=1e-5)
    for draw, joint in zip(bench.draws, along.joint_curvature, strict=True):
        own = sums(along.curvature, [draw])[0]
        if sum(len(units) for units in draw.units.values()) == 1:
            assert joint == pytest.approx(own, rel=1e-4)
    many = [i for i, draw in enumerate(bench.draws) if draw.size == 0.5]
    assert np.ptp(along.joint_curvature[many] / sums(along.curvature, [bench.draws[i] for i in many])) > 0.05, (
        "cross terms count"
    )


def test_least_joint_influence_is_below_the_joint_one_and_equal_for_one_group(bench):
    if bench.groups.granularity == "element":
        pytest.skip("the curvature of single elements is shrunk, their joint one is not")
    for reach in (1e-2, 1.0, float("inf")):
        found = bench.measured.predictions(bench.draws, reach)
        least, joint = found["least joint influence (adam)"], found["joint influence (adam)"]
        assert (least <= joint * (1 + 1e-4)).all()
        for draw, low, high in zip(bench.draws, least, joint, strict=True):
            if sum(len(units) for units in draw.units.values()) == 1:
                assert low == pytest.approx(high, rel=1e-3)
    assert (least < 0.9 * joint).any(), "cross terms count"


def test_least_joint_influence_of_elements_is_what_they_are_chosen_by(bench):
    along, reach = bench.measured.along["adam"], 0.3
    found = bench.measured.predictions(bench.draws, reach)["least joint influence (adam)"]
    steps = np.linspace(0, reach, 20_001)
    for value, draw in zip(found, bench.draws, strict=True):
        slope, roots = (sums(score, [draw])[0] for score in (along.slope, [a.sqrt() for a in along.curvature]))
        assert value == pytest.approx((steps * slope - 0.5 * (steps * roots) ** 2).max(), rel=1e-3, abs=1e-9)


def test_scores_without_a_direction(bench):
    """SNIP, GraSP (by an exact Hessian-vector product in float64), magnitude, Fisher and squared gradient."""
    model = in_double(bench.model)
    model.set_attn_implementation("eager")  # the fused kernel has no second derivative
    names = [info.name for info in bench.groups.parameters]
    weights = [model.get_parameter(name) for name in names]
    counts = [len(batch["labels"]) for batch in bench.batches]
    losses = [model(**batch).loss * count / sum(counts) for batch, count in zip(bench.batches, counts, strict=True)]
    gradients = torch.autograd.grad(sum(losses), weights, create_graph=True)
    dot = sum((gradient * gradient.detach()).sum() for gradient in gradients)
    curved = torch.autograd.grad(dot, weights)
    each = [torch.autograd.grad(model(**batch).loss, weights) for batch in bench.batches]
    expected = {
        "squared gradient norm": [g.square() for g in gradients],
        "SNIP": [(g * w).abs() for g, w in zip(gradients, weights, strict=True)],
        "GraSP": [w * hg for w, hg in zip(weights, curved, strict=True)],
        "weight magnitude": [w.abs() for w in weights],
        "per-example Fisher": [sum(g.square() for g in pieces) for pieces in zip(*each, strict=True)],
    }
    predictions = bench.measured.predictions(bench.draws, 1.0)
    for name, score in expected.items():
        dense = [_total(bench, [value.detach().flatten() for value in score], draw) for draw in bench.draws]
        np.testing.assert_allclose(predictions[name], dense, rtol=2e-2, atol=2e-3 * np.abs(dense).max(), err_msg=name)
    assert predictions["count"].tolist() == [draw.count for draw in bench.draws]


def test_a_trial_is_adam_on_the_draw_beyond_adam_on_the_head(bench):
    with measuring_mode(bench.model, restore=()):
        trial = Trial(bench.model, bench.objective, bench.collate, bench.order, (bench.collate, bench.order))
        before = copy.deepcopy(bench.model.state_dict())
        draw = bench.draws[4]
        found = trial.decreases(subset_of_draw(bench.groups, draw), 1e-2, [2, 5])
        after = bench.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    masks = {bench.groups.parameters[index].name: _mask(bench, draw, index) for index in draw.units}
    heads = {name: torch.ones_like(bench.model.get_parameter(name)) > 0 for name in bench.groups.always_train}
    assert heads
    alone, both = (_masked_adam(bench, each) for each in (heads, heads | masks))
    assert found == pytest.approx([a - b for a, b in zip(alone, both, strict=True)], rel=1e-2, abs=1e-4)


def test_a_trial_that_diverges_is_the_worst_outcome(bench, monkeypatch):
    whole = subset_of_draw(bench.groups, bench.draws[4])
    subset = replace(whole, always_train=(), new=())
    with measuring_mode(bench.model, restore=()):
        trial = Trial(bench.model, bench.objective, bench.collate, bench.order, (bench.collate, bench.order))
        assert trial.decreases(subset, 3e37, [2, 5]) == [-np.inf, -np.inf]
        assert np.isfinite(trial.decreases(subset, 1e-3, [2, 5])).all(), "the model is as before"
        monkeypatch.setattr(trial, "held_out_loss", lambda: float("nan"))
        with pytest.raises(
            AdapeftError, match=r"training only .* select\.always_train diverges at a learning rate of 0\.5"
        ):
            trial.decreases(whole, 0.5, [2, 5])


def test_a_base_whose_held_out_loss_is_not_finite_names_the_examples(bench):
    spoilt = copy.deepcopy(bench.model).eval()
    collate = lambda indices: bench.collate(indices)  # noqa: E731
    broken = lambda indices: _with_targets(bench.collate(indices), 1e38 if int(indices[0]) == 1 else None)  # noqa: E731
    objective = Regression()
    with pytest.raises(AdapeftError, match=r"held-out loss of the base model is inf.*example 1 of data\.evaluation"):
        Trial(spoilt, objective, collate, bench.order, (broken, bench.order))


def _with_targets(batch, value):
    """Return the batch with one target per output: ``value``, or 0 if it is None."""
    targets = torch.zeros(len(batch.labels), 3) if value is None else torch.full((len(batch.labels), 3), value)
    return Batch(batch.inputs, targets, batch.ids)


def _masked_adam(bench, masks):
    """Return the losses after 2 and 5 steps of dense Adam whose changes outside ``masks`` are undone."""
    model = copy.deepcopy(bench.model).eval().requires_grad_(False)
    for name in masks:
        model.get_parameter(name).requires_grad_(True)
    start = {name: model.get_parameter(name).detach().clone() for name in masks}
    optimizer = torch.optim.Adam([model.get_parameter(name) for name in masks], lr=1e-2)
    loss_of = lambda: float(  # noqa: E731
        sum(model(**batch).loss.item() * len(batch["labels"]) for batch in bench.batches)
        / sum(len(batch["labels"]) for batch in bench.batches)
    )
    expected = []
    for step in range(5):
        optimizer.zero_grad()
        model(**bench.batches[step]).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                parameter = model.get_parameter(name)
                parameter.copy_(torch.where(mask, parameter, start[name]))
        if step + 1 in (2, 5):
            expected.append(loss_of())
    return expected


def test_correlations_and_the_constant():
    draws = [type("D", (), {"size": size})() for size in (0.1, 0.1, 0.1, 0.5, 0.5, 0.5)]
    outcome = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = correlate({"good": outcome**2, "bad": -outcome, "flat": np.ones(6)}, outcome, draws)
    assert list(found) == ["good", "bad", "flat"]
    assert found["good"].all == pytest.approx(1.0)
    assert found["bad"].by_size[0.5] == pytest.approx(-1.0)
    assert np.isnan(found["flat"].all)

    slopes = np.array([1.0, 3.0, 0.5])
    diverged = np.array([-np.inf, -np.inf, 3.0, 4.0, 5.0, 6.0])
    assert correlate({"good": outcome}, diverged, draws)["good"].all > 0.9
    assert np.isnan(correlate({"good": outcome}, np.full(6, -np.inf), draws)["good"].all)

    constant = fit_constant(lambda reach: slopes * reach, 0.1 * 2.0 * slopes, sum_of_rates=2.0)
    assert constant == pytest.approx(0.1, rel=0.2)


def _mask(bench, draw, index):
    info = bench.groups.parameters[index]
    mask = torch.zeros(info.shape, dtype=torch.bool)
    if bench.groups.granularity == "element":
        mask.view(-1)[draw.units[index]] = True
    elif bench.groups.is_row[index]:
        mask.index_fill_(info.output_dim, draw.units[index], True)
    else:
        mask[...] = True
    return mask


def _total(bench, elements, draw):
    return sum(float(elements[index][_mask(bench, draw, index).flatten()].sum()) for index in draw.units)


def _same(a, b):
    return len(a) == len(b) and all(
        x.units.keys() == y.units.keys() and all(torch.equal(x.units[k], y.units[k]) for k in x.units)
        for x, y in zip(a, b, strict=True)
    )
