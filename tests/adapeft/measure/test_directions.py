"""Numbers of directions, against the dense second moments of gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from adapeft.measure import directions
from adapeft.measure.directions import effective_rank, measure_directions
from adapeft.measure.groups import build_groups
from adapeft.measure.shards.shards import WholeModel
from adapeft.parts.adapter import Adapter
from adapeft.parts.elements import Elements
from adapeft.parts.rows import Rows
from tests.on_ranks.statistics import passes_for
from tests.oracles.measuring import gradients, num_predictions, sampled
from tests.support.thread_ranks import on_ranks
from tests.support.tiny import make_batches, make_bert


def test_the_estimate_is_right_far_above_the_number_of_vectors():
    """The spectrum has 60 equal eigenvalues and 1,000 small ones, of which 16 vectors show too few."""
    torch.manual_seed(0)
    spectrum = torch.cat([torch.ones(60), torch.full((1000,), 0.003)]).double()
    expected = float(spectrum.sum() ** 2 / spectrum.square().sum())
    found = []
    for _ in range(200):
        vectors = torch.randn(16, len(spectrum), dtype=torch.float64) * spectrum.sqrt()
        found.append(effective_rank(vectors @ vectors.T))
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.1)


def test_one_direction_is_one():
    vectors = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, 2.0], [-1.0, -2.0]])
    assert effective_rank(vectors @ vectors.T) == 1.0


def _model():
    model = make_bert().eval()
    groups = build_groups(model, "element")
    names = [info.name for info in groups.parameters]
    weight = next(name for name in names if name.endswith("attention.output.dense.weight"))
    shape = next(info.shape for info in groups.parameters if info.name == weight)
    last = groups.parameters[-1]
    parts = {weight: Rows(shape, torch.tensor([1, 4])), last.name: Elements(last.shape, torch.tensor([0, 2]))}
    return model, groups, names, parts


def test_against_dense_gradients(monkeypatch):
    monkeypatch.setattr(directions, "_ELEMENTS", 10**6)  # a draw of all, in effect
    model, groups, names, parts = _model()
    found = measure_directions(passes_for(model, WholeModel(model, names)), groups, parts)
    half_b = sampled(model, make_batches(model, num_batches=7), seed=3)[3:]
    vectors = torch.stack([torch.cat(gradients(model, batch, groups)) for batch in half_b])
    vectors *= torch.tensor([num_predictions(batch) for batch in half_b]).double().sqrt()[:, None]
    sizes = vectors.square().mean(0).sqrt()

    def dense(mask):
        mean = float(sizes[mask].mean())
        weighted = vectors[:, mask] / sizes[mask].clamp(min=1e-3 * mean)
        gram = weighted @ vectors[:, mask].T
        pairs = gram[~torch.eye(len(gram), dtype=torch.bool)]
        return float(gram.diagonal().mean() ** 2 / pairs.square().mean())

    masks = [
        parts[info.name].mask() if info.name in parts else torch.zeros(info.count, dtype=torch.bool)
        for info in groups.parameters
    ]
    assert found.chosen == pytest.approx(dense(torch.cat(masks)), rel=1e-4)
    every = torch.ones(vectors.shape[1], dtype=torch.bool)
    assert found.candidates == pytest.approx(dense(every), rel=1e-3)
    assert found.candidates > 1.2 * found.chosen


@pytest.mark.parametrize(
    ("chosen", "candidates", "is_told"), [(3.9, 12.0, True), (4.1, 11.9, True), (4.1, 12.0, False)]
)
def test_few_batches_do_not_tell_a_third_of_many_directions(monkeypatch, chosen, candidates, is_told):
    ranks = iter([chosen, candidates])
    monkeypatch.setattr(directions, "effective_rank", lambda gram: next(ranks))
    model, groups, names, parts = _model()
    passes = passes_for(model, WholeModel(model, names))
    assert len(passes.calibration.half_b) == 4
    assert measure_directions(passes, groups, parts) == ((chosen, candidates) if is_told else None)


@pytest.mark.parametrize("kept", [10**6, 20])
def test_ranks_and_micro_batches_change_nothing(monkeypatch, kept):
    monkeypatch.setattr(directions, "_ELEMENTS", kept)
    model, groups, names, parts = _model()
    alone = measure_directions(passes_for(model, WholeModel(model, names)), groups, parts)

    models = [copy.deepcopy(model) for _ in range(3)]

    def on_rank(ranks):
        mine = models[ranks.rank]
        return measure_directions(passes_for(mine, WholeModel(mine, names, num_micro=2, ranks=ranks)), groups, parts)

    for found in on_ranks(3, on_rank):
        assert tuple(found) == pytest.approx(tuple(alone), rel=1e-3)


def test_parameters_that_no_batch_reaches_shift_nothing():
    """The slices count all parameters that were measured, the candidates only those that were reached."""
    model, groups, names, parts = _model()
    shards = WholeModel(model, names)
    for name in names[:3]:
        model.get_parameter(name).requires_grad_(False)
    passes = passes_for(model, shards)
    reached = groups.without(names[:3])
    others = measure_directions(passes_for(model, WholeModel(model, names[3:])), reached, parts)
    assert tuple(measure_directions(passes, reached, parts)) == pytest.approx(tuple(others), rel=1e-4)


def test_where_there_are_none_to_tell(monkeypatch):
    model, groups, names, parts = _model()
    passes = passes_for(model, WholeModel(model, names))
    assert measure_directions(passes, groups, {}) is None
    assert measure_directions(passes, groups, {"bert.encoder.layer.0": Adapter((32,), 2)}) is None
    monkeypatch.setattr(directions, "_FEWEST_BATCHES", 5)
    assert measure_directions(passes, groups, parts) is None
