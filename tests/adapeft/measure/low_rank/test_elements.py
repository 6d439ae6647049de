"""Elements from factors against dense float64 gradients, and against the same columns held densely."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import adapeft
from adapeft.choose.elements import choose_elements
from adapeft.choose.joint_elements import choose_elements_jointly
from adapeft.choose.scores import Scores
from adapeft.errors import AdapeftError
from adapeft.measure.exact.elementwise import shrinkage_of
from adapeft.measure.influence import influence
from adapeft.measure.low_rank import elements as elements_of_low_rank
from adapeft.measure.low_rank.elements import (
    gradient_and_fisher,
    measure_direction_of_elements,
    measure_elements_of_low_rank,
)
from adapeft.measure.low_rank.factored import OF_COLUMNS, OF_ROWS, FactoredShard
from adapeft.measure.low_rank.moments import measure_moments
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.measure.storage import ELEMENTS, load_statistics, save_elements, save_groups
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import OneRank
from tests.adapeft.measure.low_rank.test_low_rank import SCALES, looking, oriented
from tests.oracles.measuring import gradients, mean_gradients, num_predictions, sampled
from tests.support.tiny import make_batches, make_bert, make_gpt2, make_mixtral

RANK = 5


@pytest.fixture(scope="module", params=[make_bert, make_gpt2, make_mixtral])
def model(request):
    """Return a float64 model, which measuring leaves as it was."""
    return request.param().double().eval()


@dataclass
class Measured:
    """Elements measured through windows, with bases U and V, and dense steps [out, in] or flat, float64."""

    passes: Passes
    bases: dict[int, tuple[Tensor, Tensor]]
    dense: list[Tensor]
    statistics: Statistics


def measured_elements(
    model,
    rank: int = RANK,
    kind: str = "adam",
    *,
    shrinkage: bool = False,
    num_micro: int = 1,
    scale: float = 1.0,
) -> Measured:
    with looking(model, "element", rank, num_micro, scale=scale) as (passes, groups):
        direction = measure_direction_of_elements(passes, kind)
        windows = passes.shards.windows
        bases = {
            index: tuple(of(index).double() for of in (windows.left_of, windows.right_of)) for index in windows.matrices
        }
        dense = [piece.double() for piece in direction.others]
        for index, product in direction.products.items():
            dense[index] = product.rows.double() @ product.columns.double().mT
        statistics = measure_elements_of_low_rank(passes, groups, direction, shrinkage=shrinkage)
        return Measured(passes, bases, dense, statistics)


@pytest.fixture(scope="module")
def statistics(model) -> Statistics:
    return measured_elements(model, shrinkage=True).statistics


def dense(statistics: Statistics) -> tuple[ElementShard, ...]:
    """Return shards that hold their columns."""
    return tuple(ElementShard(shard.slice, dict(shard.columns)) for shard in statistics.elements)


def seen_of(bases: tuple[Tensor, Tensor], gradient: Tensor) -> Tensor:
    """Return what both windows show of a gradient [out, in]: all but what is outside of both spaces."""
    left, right = (basis @ basis.mT for basis in bases)
    rest = gradient - gradient @ right
    return gradient - (rest - left @ rest)


def column_of(found: Measured, index: int, name: str) -> Tensor:
    """Return a column of a candidate's elements, [out, in] for a matrix."""
    column = found.statistics.values_of(index, lambda columns: columns[name]).double()
    info = found.statistics.groups.parameters[index]
    return oriented(info, column) if index in found.bases else column


def test_the_sums_of_factors_are_those_of_their_elements(statistics):
    for name in ("slope", "curvature"):
        expected = np.zeros(statistics.groups.num_groups)
        for shard in dense(statistics):
            expected[statistics.groups.firsts[shard.slice.parameter]] += float(shard.columns[name].double().sum())
        scale = np.abs(expected).max()
        np.testing.assert_allclose(statistics.columns[name], expected, rtol=1e-5, atol=1e-6 * scale)


def diagonal_of(found: Measured, index: int) -> Tensor:
    """Return the diagonal of the Fisher matrix of a candidate with windows, [out, in]."""
    shards = [shard for shard in found.statistics.elements if shard.slice.parameter == index]
    pieces = []
    for shard in sorted(shards, key=lambda shard: shard.slice.start):
        piece = (shard.tensors["moment_rows"] @ shard.tensors["moment_columns"].t()).double()
        pieces.append((piece.t() if shard.is_transposed else piece).flatten())
    return oriented(found.statistics.groups.parameters[index], torch.cat(pieces))


@pytest.mark.parametrize("kind", ["adam", "gradient"])
def test_slopes_are_those_of_the_gradient_seen_from_both_sides(model, kind):
    batches = make_batches(model, num_batches=7)
    found = measured_elements(model, kind=kind)
    groups = found.statistics.groups
    mean = mean_gradients(model, batches[3:], groups)
    for index, info in enumerate(groups.parameters):
        gradient = mean[index]
        if index in found.bases:
            gradient = seen_of(found.bases[index], oriented(info, gradient))
        expected = gradient * found.dense[index]
        atol = 1e-5 * float(expected.abs().max()) + 1e-9
        torch.testing.assert_close(column_of(found, index, "slope"), expected, rtol=1e-3, atol=atol)


def test_errors_of_slopes_are_those_of_the_gradients_of_single_batches_seen_from_both_sides(model):
    found = measured_elements(model)
    groups = found.statistics.groups
    half_b = make_batches(model, num_batches=7)[3:]
    weights = np.array([num_predictions(batch) for batch in half_b])
    each = np.zeros((len(half_b), groups.num_groups))
    for row, batch in zip(each, half_b, strict=True):
        for index, (info, gradient) in enumerate(zip(groups.parameters, gradients(model, batch, groups), strict=True)):
            if index in found.bases:
                gradient = seen_of(found.bases[index], oriented(info, gradient))
            row[groups.firsts[index]] = float((gradient * found.dense[index]).sum())
    mean = weights @ each / weights.sum()
    error = np.sqrt(weights @ (each - mean) ** 2 / weights.sum() / (len(half_b) - 1))
    np.testing.assert_allclose(found.statistics.columns["slope"], mean, rtol=1e-3, atol=1e-5 * np.abs(mean).max())
    np.testing.assert_allclose(found.statistics.columns["slope_error"], error, rtol=1e-3, atol=1e-5 * error.max())


def test_the_direction_is_adams_with_factored_moments(model, monkeypatch):
    batches = make_batches(model, num_batches=7)
    taken = []

    def kept(measure, moments_of):
        def measured(*args):
            found = measure(*args)
            taken.append(moments_of(found))
            return found

        return measured

    for measure, moments_of in ((measure_moments, lambda found: found), (gradient_and_fisher, lambda found: found[2])):
        monkeypatch.setattr(elements_of_low_rank, measure.__name__, kept(measure, moments_of))
    found = measured_elements(model)
    groups = found.statistics.groups
    mean = mean_gradients(model, batches[:3], groups)
    each = [gradients(model, batch, groups) for batch in batches[:3]]
    weights = [num_predictions(batch) for batch in batches[:3]]
    drawn = sampled(model, batches, found.passes.seed)[3:]
    draws = [(num_predictions(one), gradients(model, one, groups)) for one in drawn]
    for index, info in enumerate(groups.parameters):
        if index in found.bases:
            rows, columns = (getattr(taken[0].of_matrices[index], name).double() for name in ("rows", "columns"))
            moment = rows[..., None] * columns[..., None, :] / columns.sum(-1)[..., None, None]
            expected = seen_of(found.bases[index], oriented(info, mean[index])) / moment.sqrt().clamp(min=1e-12)
            rows, columns = (getattr(taken[1].of_matrices[index], name).double() for name in ("rows", "columns"))
            fisher = rows[..., None] * columns[..., None, :] / columns.sum(-1)[..., None, None]
        else:
            square = sum(n * g[index] ** 2 for n, g in zip(weights, each, strict=True)) / sum(weights)
            expected = mean[index] / square.sqrt().clamp(min=1e-12)
            fisher = torch.stack([n * g[index] ** 2 for n, g in draws]).mean(0)
        # The floor under moments is 1e-5 of the model's root mean square.
        if "query" not in info.name and "key" not in info.name:
            torch.testing.assert_close(found.dense[index], expected, rtol=5e-3, atol=5e-3)
        curvature = fisher * found.dense[index] ** 2
        atol = 1e-5 * float(curvature.max()) + 1e-12
        torch.testing.assert_close(column_of(found, index, "curvature"), curvature, rtol=1e-3, atol=atol)


def test_curvatures_are_shrunk_towards_the_mean_of_their_matrix(model):
    plain, shrunk = (measured_elements(model, shrinkage=shrinkage) for shrinkage in (False, True))
    draws, shares = len(plain.passes.calibration.half_b), []
    for index in plain.bases:
        steps, diagonal = plain.dense[index].square(), diagonal_of(plain, index)
        mean, square = diagonal.mean((-2, -1), keepdim=True), diagonal.square().mean((-2, -1), keepdim=True)
        share = shrinkage_of(mean, square, draws)
        shares.append(float(share.min()))
        expected = ((1 - share) * diagonal + share * mean) * steps
        atol = 1e-5 * float(expected.max())
        torch.testing.assert_close(column_of(shrunk, index, "curvature"), expected, rtol=1e-3, atol=atol)
    assert 0 < min(shares) < 1


def test_moments_at_sampled_labels_are_those_of_the_fisher_diagonal(model):
    """The sums over a matrix, of which rows and columns give unbiased estimates, over many windows."""
    batches = make_batches(model, num_batches=7)
    sums = []
    for seed in range(30):
        with looking(model, "element", RANK, seed=seed) as (passes, groups):
            moments = gradient_and_fisher(passes)[2].of_matrices
            sums.append([(float(one.rows.sum()), float(one.columns.sum())) for one in moments.values()])
    drawn = sampled(model, batches, passes.seed)[3:]
    each = [[num_predictions(one) * g.square().sum() for g in gradients(model, one, groups)] for one in drawn]
    exact = torch.tensor(each).mean(0)[list(moments)].numpy()
    found = np.array(sums)
    error = found.std(0, ddof=1) / len(sums) ** 0.5
    assert (np.abs(found.mean(0) - exact[:, None]) <= 5 * error + 1e-5 * exact.max()).all()


@pytest.mark.parametrize("num_micro", [2, 3])
def test_micro_batches_only_round_differently(model, num_micro):
    whole, split = (measured_elements(model, num_micro=number) for number in (1, num_micro))
    assert split.passes.shards.num_micro == num_micro
    for index in range(len(whole.statistics.groups.parameters)):
        for name in ("slope", "curvature"):
            expected = column_of(whole, index, name)
            atol = 1e-5 * float(expected.abs().max()) + 1e-9
            torch.testing.assert_close(column_of(split, index, name), expected, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["adam", "gradient"])
def test_the_scale_of_the_loss_scales_slopes_and_curvatures_alone(model, kind, scale):
    plain, scaled = (measured_elements(model, kind=kind, scale=one) for one in (1.0, scale))
    # The squares of what is rounding alone, such as the gradient of a key's bias, may be too small for float32.
    least = {name: 1e-12 * float(np.abs(column).max()) for name, column in plain.statistics.columns.items()}
    for index, direction in enumerate(plain.dense):
        torch.testing.assert_close(scaled.dense[index], direction, rtol=1e-5, atol=1e-5 * float(direction.abs().max()))
        for name, power in (("slope", 1), ("curvature", 2)):
            expected = column_of(plain, index, name)
            atol = 1e-5 * float(expected.abs().max()) + least[name]
            torch.testing.assert_close(column_of(scaled, index, name) / scale**power, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("scale", [1.0, *SCALES])
def test_a_matrix_whose_gradient_is_rounding_has_no_direction(bert, scale):
    """Make the keys so small that the queries' gradient is far below the others'."""
    with torch.no_grad():
        bert.bert.encoder.layer[0].attention.self.key.weight.mul_(1e-9)
    found = measured_elements(bert.eval(), scale=scale)
    sizes = {
        info.name: float(step.square().mean().sqrt())
        for info, step in zip(found.statistics.groups.parameters, found.dense, strict=True)
    }
    assert sizes["bert.encoder.layer.0.attention.self.query.weight"] < 1e-2
    assert sizes["bert.encoder.layer.0.attention.self.value.weight"] > 0.1


def test_random_windows_come_back(model):
    with looking(model, "element", RANK) as (passes, _):
        windows = passes.shards.windows
        index = windows.matrices[0]
        buffers = [windows.left_of(index), windows.right_of(index)]
        before = [buffer.clone() for buffer in buffers]
        measure_direction_of_elements(passes, "adam")
        assert not any(torch.equal(buffer, value) for buffer, value in zip(buffers, before, strict=True))
        windows.look_randomly()
        assert all(torch.equal(buffer, value) for buffer, value in zip(buffers, before, strict=True))


def test_factored_and_dense_shards_give_the_same_choice(statistics):
    groups, held = statistics.groups, dense(statistics)
    assert any(shard.is_factored for shard in statistics.elements)

    def value(columns):
        return influence(columns["slope"], columns["curvature"], 0.01)

    for choose in (
        lambda shards: choose_elements(groups, shards, value, 300, OneRank()),
        lambda shards: choose_elements(groups, shards, value, 300, OneRank(), by_tensor=True),
        lambda shards: choose_elements_jointly(groups, shards, 300, 0.01, OneRank()),
    ):
        ours, expected = choose(statistics.elements), choose(held)
        assert ours.parts.keys() == expected.parts.keys()
        assert all(torch.equal(ours.parts[name].indices, part.indices) for name, part in expected.parts.items())
        assert ours.choice.value == expected.choice.value


def test_scores_of_factored_shards_are_not_kept(statistics, monkeypatch):
    computed = []
    columns = FactoredShard.columns.fget
    monkeypatch.setattr(
        FactoredShard, "columns", property(lambda shard: computed.append(shard.slice) or columns(shard))
    )
    scores = Scores(statistics.elements, lambda columns: columns["slope"])
    assert not computed
    for _ in range(2):
        assert len(list(scores)) == len(statistics.elements)
    assert len(computed) == 2 * sum(shard.is_factored for shard in statistics.elements)


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_every_element_is_on_one_rank(statistics, world_size, monkeypatch):
    monkeypatch.setattr(elements_of_low_rank, "_LARGEST", 60)
    for shard in statistics.elements:
        if not shard.is_factored or len(statistics.groups.parameters[shard.slice.parameter].shape) == 3:
            continue  # a shard of an expert is a part of its tensor
        info = statistics.groups.parameters[shard.slice.parameter]
        pieces = [
            elements_of_low_rank._shard(shard.slice.parameter, info, *place, shard.tensors)
            for rank in range(world_size)
            for place in elements_of_low_rank._ranges(info, rank, world_size)
        ]
        assert max(piece.slice.length for piece in pieces) <= 60
        assert [piece.slice.start for piece in pieces[1:]] == [
            piece.slice.start + piece.slice.length for piece in pieces[:-1]
        ]
        for name, column in shard.columns.items():
            joined = torch.cat([piece.columns[name] for piece in pieces])
            torch.testing.assert_close(joined, column, rtol=1e-5, atol=1e-6 * float(column.abs().max()))


@pytest.mark.parametrize("world_size", [1, 2, 5, 50])
def test_every_expert_is_divided_among_the_ranks(world_size):
    info = ParameterInfo("experts", (3, 7, 4), "experts", 0, 0.5, None)
    places = [place for rank in range(world_size) for place in elements_of_low_rank._ranges(info, rank, world_size)]
    covered = [(expert, row) for expert, start, stop in places for row in range(start, stop)]
    assert covered == [(expert, row) for expert in range(3) for row in range(7)]


def test_saved_factors_load_as_they_were(statistics, tmp_path):
    save_groups(tmp_path, statistics.groups, statistics.columns, {})
    save_elements(tmp_path, statistics.elements, OneRank())
    loaded, _ = load_statistics(tmp_path)
    assert len(loaded.elements) == len(statistics.elements)
    for ours, expected in zip(loaded.elements, statistics.elements, strict=True):
        assert type(ours) is type(expected)
        assert ours.slice == expected.slice
        # Their products round differently where the factors lie differently in memory.
        assert ours.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_pieces_of_one_matrix_are_saved_with_their_common_factors_once(statistics, tmp_path, monkeypatch):
    monkeypatch.setattr(elements_of_low_rank, "_LARGEST", 60)
    groups = statistics.groups
    pieces = []
    for shard in statistics.elements:
        info = groups.parameters[shard.slice.parameter]
        if not shard.is_factored or len(info.shape) == 3:
            pieces.append(shard)
            continue
        for place in elements_of_low_rank._ranges(info, 0, 1):
            pieces.append(elements_of_low_rank._shard(shard.slice.parameter, info, *place, shard.tensors))
    assert len(pieces) > len(statistics.elements)
    save_groups(tmp_path, groups, statistics.columns, {})
    save_elements(tmp_path, tuple(pieces), OneRank())
    loaded, _ = load_statistics(tmp_path)
    for ours, expected in zip(loaded.elements, pieces, strict=True):
        assert ours.slice == expected.slice
        assert ours.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in expected.tensors.items())
    held = {(tensor.data_ptr(), tensor.shape) for shard in pieces for tensor in shard.tensors.values()}
    (file,) = (tmp_path / ELEMENTS).iterdir()
    with safe_open(file, "pt") as content:
        assert len(content.keys()) == len(held)


@pytest.mark.parametrize("name", [*OF_ROWS, *OF_COLUMNS])
def test_factors_of_other_sizes_are_refused(statistics, tmp_path, name):
    shards = list(statistics.elements)
    place = next(index for index, shard in enumerate(shards) if shard.is_factored)
    tensors = dict(shards[place].tensors)
    tensors[name] = tensors[name][:-1].clone()
    shards[place] = replace(shards[place], tensors=tensors)
    save_groups(tmp_path, statistics.groups, statistics.columns, {})
    save_elements(tmp_path, tuple(shards), OneRank())
    with pytest.raises(AdapeftError, match=r"damaged shard of statistics.*\bMeasure again"):
        load_statistics(tmp_path)


def test_columns_of_the_groups_are_sums_of_the_elements(statistics):
    for name in ("slope", "curvature"):
        column = statistics.columns[name]
        for index in range(len(statistics.groups.parameters)):
            values = statistics.values_of(index, lambda columns, name=name: columns[name]).double()
            assert column[index] == pytest.approx(float(values.sum()), rel=1e-4, abs=1e-6 * float(values.abs().sum()))


@pytest.mark.parametrize("joint", [True, False])
def test_the_chosen_elements_capture_what_the_exact_choice_does(joint):
    model = make_bert()
    options = {"groups": "element", "budget": "10%", "num_steps": 50, "joint": joint, "warmup_steps": 4}
    batches = make_batches(model, num_batches=16)
    exact = adapeft.select(model, batches, measure="exact", **options)
    low = adapeft.select(model, batches, measure="low-rank", rank=8, **options)
    assert 0.5 * exact.count <= low.count <= exact.count
    names = exact.parts.keys() & low.parts.keys()
    shared = sum(len(np.intersect1d(low.parts[name].indices, exact.parts[name].indices)) for name in names)
    assert shared > 3 * 0.1 * low.count, "a random draw shares a tenth"
