"""Windows of low rank against dense float64 gradients, and against the exact measurement."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adapeft
from adapeft.config.load import parse_select
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups, build_groups
from adapeft.measure.low_rank import direction as direction_of_low_rank
from adapeft.measure.low_rank import moments as moments_of_low_rank
from adapeft.measure.low_rank.direction import measure_direction_of_low_rank
from adapeft.measure.low_rank.moments import measure_moments
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.low_rank.windows import SeenShards, Windows
from adapeft.measure.mode import measuring_mode
from adapeft.measure.options import measure_with_options
from adapeft.measure.partial import PartialSums
from adapeft.measure.passes import Passes
from adapeft.measure.projections import measure_projections
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.registry import get_method
from adapeft.model.structure import ParameterInfo
from adapeft.ranks import OneRank
from adapeft.tasks.losses.objective import MeanLoss
from tests.on_ranks.statistics import passes_for
from tests.oracles.measuring import gradients, group_sums, mean_gradients, num_predictions, sampled
from tests.support.tiny import make_batches, make_bert, make_gpt2, make_mixtral

RANKS = (3, 12)
"""A thin window, and one as wide as most layers of the tiny models."""
SCALES = (2.0**-20, 2.0**20)
"""Factors of a loss, which as powers of two change no rounding."""


@dataclass
class Measured:
    """Low-rank direction: of the leaves, and as the dense step of every candidate, flat float64."""

    passes: Passes
    groups: Groups
    direction: list[Tensor]
    dense: list[Tensor]

    @property
    def windows(self) -> Windows:
        assert isinstance(self.passes.shards, SeenShards)
        return self.passes.shards.windows


class ScaledLoss(MeanLoss):
    """A loss times a number."""

    shares_forward = True

    def __init__(self, objective: MeanLoss, scale: float) -> None:
        self._objective, self._scale = objective, scale

    def num_predictions(self, labels: Tensor) -> int:
        return self._objective.num_predictions(labels)

    def loss(self, model, batch, *, sample_seed=None, num_labels=None):
        return self.losses(model, batch, [sample_seed], num_labels=num_labels)[0]

    def losses(self, model, batch, sample_seeds, *, num_labels=None):
        found = self._objective.losses(model, batch, sample_seeds, num_labels=num_labels)
        return tuple(loss * self._scale for loss in found)


@contextmanager
def looking(
    model: nn.Module, granularity: str, rank: int, num_micro: int = 1, seed: int = 1, scale: float = 1.0
) -> Iterator[tuple[Passes, Groups]]:
    groups = build_groups(model, granularity)
    with measuring_mode(model, restore=groups.always_train), seen(model, groups, rank, seed) as view:
        shards = view.shards(WholeModel(model, view.names, groups.always_train, num_micro))
        passes = passes_for(model, shards)
        yield replace(passes, objective=ScaledLoss(passes.objective, scale)), groups


@contextmanager
def directed(
    model: nn.Module,
    granularity: str,
    rank: int,
    kind: str = "adam",
    num_micro: int = 1,
    seed: int = 1,
    scale: float = 1.0,
):
    with looking(model, granularity, rank, num_micro, seed, scale) as (passes, groups):
        direction = measure_direction_of_low_rank(passes, kind)
        windows = passes.shards.windows
        dense = []
        for index, (info, along) in enumerate(zip(groups.parameters, direction, strict=True)):
            if index in windows.matrices:
                step = along.view(windows.shapes[index]).double() @ windows.right_of(index).double().mT
                along = (step.t() if info.output_dim == 1 else step).reshape(-1)
            dense.append(along.double())
        yield Measured(passes, groups, direction, dense)


@pytest.fixture(params=RANKS)
def rank(request):
    return request.param


@pytest.fixture(params=[make_bert, make_gpt2, make_mixtral])
def model(request):
    """Return a float64 model, so rounding of its gradients is negligible."""
    return request.param().double().eval()


def test_the_loss_is_the_models_own_and_the_model_is_left_as_it_was(model, rank):
    batch = make_batches(model)[0]
    before, classes = dict(model.named_parameters()), [type(module) for module in model.modules()]
    state, loss = {name: value.clone() for name, value in model.state_dict().items()}, model(**batch).loss
    with directed(model, "row", rank):
        assert set(dict(model.named_parameters())) > set(before)
        torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-12, atol=0)
    assert [type(module) for module in model.modules()] == classes
    assert all(a is b for a, b in zip(model.parameters(), before.values(), strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("granularity", ["row", *(pytest.param(g, marks=pytest.mark.slow) for g in ("tensor", "role"))])
def test_slopes_and_curvatures_are_exact_along_the_direction(model, rank, granularity):
    batches = make_batches(model, num_batches=7)
    with directed(model, granularity, rank) as found:
        leaves = found.windows.groups
        columns = measure_projections(found.passes, leaves, found.direction)
        slopes, errors, curvatures = (columns[name] for name in ("slope", "slope_error", "curvature"))

    def project(pieces: list[Tensor]) -> np.ndarray:
        return group_sums(found.groups, [g * d for g, d in zip(pieces, found.dense, strict=True)])

    half_b, drawn = batches[3:], sampled(model, batches, found.passes.seed)[3:]
    weights = np.array([num_predictions(batch) for batch in half_b])
    each = np.stack([project(gradients(model, batch, found.groups)) for batch in half_b])
    # Sums of products of float32 leaves, at most a few hundred per group.
    size = np.abs(each).max()
    mean = weights @ each / weights.sum()
    np.testing.assert_allclose(slopes, mean, rtol=1e-4, atol=1e-5 * size)
    error = np.sqrt(weights @ (each - mean) ** 2 / weights.sum() / (len(half_b) - 1))
    np.testing.assert_allclose(errors, error, rtol=1e-3, atol=1e-5 * size)
    draws = [num_predictions(batch) * project(gradients(model, batch, found.groups)) ** 2 for batch in drawn]
    np.testing.assert_allclose(curvatures, np.mean(draws, axis=0), rtol=1e-3, atol=1e-5 * np.max(draws))
    assert (curvatures >= 0).all()


def test_a_window_as_wide_as_the_layer_shows_the_whole_direction(model, monkeypatch):
    """Compare with the formula of the direction for dense gradients, given the measured moments of columns."""
    monkeypatch.setattr(moments_of_low_rank, "_LEAST", 0.0)
    measured = []
    monkeypatch.setattr(
        direction_of_low_rank, "measure_moments", lambda *args: measured.append(measure_moments(*args)) or measured[0]
    )
    half_a = make_batches(model, num_batches=7)[:3]
    weights = [num_predictions(batch) for batch in half_a]
    with directed(model, "row", 12) as found:
        each = [gradients(model, batch, found.groups) for batch in half_a]
        compared = 0
        for index in found.windows.matrices:
            info = found.groups.parameters[index]
            if set(info.shape) != {12}:
                continue  # the window, or the range of its random draws, is narrower than the layer
            batches = [oriented(info, of[index]) for of in each]
            mean = sum(n * g for n, g in zip(weights, batches, strict=True)) / sum(weights)
            roots = measured[0].of_matrices[index].columns.double().sqrt()
            seen = [g * roots.mean() / roots for g in batches]
            rows = sum(n * g.square().sum(1) for n, g in zip(weights, seen, strict=True)) / sum(weights)
            expected = mean * (roots.mean() / roots) ** 2 * 12**0.5 / rows[:, None].sqrt()
            # The floor under moments is 1e-5 of the model's root mean square.
            is_quiet = "query" in info.name or "key" in info.name
            rtol, atol = (1e-1, 1e-1) if is_quiet else (2e-3, 2e-3)
            torch.testing.assert_close(oriented(info, found.dense[index]), expected, rtol=rtol, atol=atol)
            compared += 1
        assert compared >= 2


def oriented(info: ParameterInfo, flat: Tensor) -> Tensor:
    """Return a flat matrix as [out, in]."""
    return flat.view(info.shape).t() if info.output_dim == 1 else flat.view(info.shape)


def test_the_gradient_as_direction_has_the_exact_scale(model):
    """Its estimate over 12 random columns of each matrix has an error of about a tenth."""
    half_a = make_batches(model, num_batches=7)[:3]
    with directed(model, "row", 12, "gradient") as found:
        mean = mean_gradients(model, half_a, found.groups)
        scale = torch.cat(mean).square().mean().sqrt()
        others = [i for i in range(len(mean)) if i not in found.windows.matrices]
        for index in others:
            ratio = found.dense[index].norm() * scale / mean[index].norm()
            assert 0.7 < ratio < 1.4


def test_moments_are_unbiased(model):
    """The mean of row and column moments over many random windows is exact within five standard errors."""
    batches = make_batches(model, num_batches=7)[:3]
    weights = torch.tensor([num_predictions(batch) for batch in batches], dtype=torch.float64)
    groups = build_groups(model, "tensor")
    each = [gradients(model, batch, groups) for batch in batches]
    drawn = []
    for seed in range(40):
        with measuring_mode(model, restore=groups.always_train), seen(model, groups, 6, seed) as view:
            shards = view.shards(WholeModel(model, view.names, groups.always_train))
            passes = passes_for(model, shards)
            drawn.append(measure_moments(passes, shards, "ranges", passes.calibration.half_a).of_matrices)
    for index in drawn[0]:
        info = groups.parameters[index]
        squares = torch.stack([pieces[index].view(info.shape).square() for pieces in each])
        moment = torch.tensordot(weights, squares, 1) / weights.sum()
        moment = moment.t() if info.output_dim == 1 else moment
        for found, exact in (
            (torch.stack([one[index].columns for one in drawn]).double(), moment.sum(-2)),
            (torch.stack([one[index].rows for one in drawn]).double(), moment.sum(-1)),
        ):
            error = found.std(0) / len(drawn) ** 0.5
            assert (found.mean(0) - exact).abs().le(5 * error + 1e-5 * exact.max()).all(), info.name


@pytest.mark.parametrize("num_micro", [2, 3])
def test_micro_batches_only_round_differently(model, num_micro):
    found = []
    for number in (1, num_micro):
        with directed(model, "row", 3, num_micro=number) as measured:
            leaves = measured.windows.groups
            found.append(measure_projections(measured.passes, leaves, measured.direction)["slope"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-5 * np.abs(found[0]).max())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["adam", "gradient"])
def test_the_scale_of_the_loss_scales_slopes_and_curvatures_alone(model, kind, scale):
    found = []
    for one in (1.0, scale):
        with directed(model, "row", 3, kind, scale=one) as measured:
            found.append(
                (measured.dense, measure_projections(measured.passes, measured.windows.groups, measured.direction))
            )
    (directions, columns), (others, scaled) = found
    for direction, other in zip(directions, others, strict=True):
        torch.testing.assert_close(other, direction, rtol=1e-5, atol=1e-5 * float(direction.abs().max()))
    for name, power in (("slope", 1), ("slope_error", 1), ("curvature", 2)):
        atol = 1e-5 * np.abs(columns[name]).max()
        np.testing.assert_allclose(scaled[name] / scale**power, columns[name], rtol=1e-5, atol=atol)


def test_options_are_those_of_the_truncated_direction(model):
    batches = make_batches(model, num_batches=7)
    with directed(model, "row", 4) as found:
        columns, options = measure_with_options(
            found.passes, found.groups, found.direction, ("tensor", "lora"), (1, 2, 5), found.windows.groups
        )
    assert set(options.ranks) == {0, 1, 2}, "a window of rank 4 shows no direction of rank 5"
    assert len(columns["slope"]) == found.groups.num_groups

    def steps() -> Iterator[tuple[int, Tensor]]:
        for index, of_rank in zip(options.parameters, options.ranks, strict=True):
            matrix = found.dense[index].view(found.groups.parameters[index].shape)
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            yield index, (matrix if of_rank == 0 else (u[:, :of_rank] * s[:of_rank]) @ vt[:of_rank]).flatten()

    def along(pieces: list[Tensor]) -> np.ndarray:
        return np.array([float(pieces[index] @ step) for index, step in steps()])

    half_b, drawn = batches[3:], sampled(model, batches, found.passes.seed)[3:]
    weights = np.array([num_predictions(batch) for batch in half_b])
    each = np.stack([along(gradients(model, batch, found.groups)) for batch in half_b])
    np.testing.assert_allclose(
        options.slopes, weights @ each / weights.sum(), rtol=1e-3, atol=1e-4 * np.abs(each).max()
    )
    draws = [num_predictions(batch) * along(gradients(model, batch, found.groups)) ** 2 for batch in drawn]
    np.testing.assert_allclose(options.curvatures, np.mean(draws, axis=0), rtol=2e-3, atol=1e-5 * np.max(draws))


def test_the_chosen_rows_capture_what_the_exact_choice_does():
    model = make_bert()
    batches = make_batches(model, num_batches=16)
    options = {"groups": "row", "budget": "30%", "num_steps": 50, "warmup_steps": 4}
    exact = adapeft.select(model, batches, measure="exact", **options)
    low = adapeft.select(model, batches, measure="low-rank", rank=8, **options)
    assert low.count == pytest.approx(exact.count, rel=0.05)
    assert low.choice.value == pytest.approx(exact.choice.value, rel=0.5)


@pytest.mark.parametrize("granularity", ["tensor", "row", "role", "element"])
def test_small_models_are_measured_exactly_by_default(granularity):
    model = make_bert()
    options = {"groups": granularity, "budget": "30%", "warmup_steps": 4}
    choices = [
        adapeft.select(model, make_batches(model), measure=how, **options).choice.value
        for how in ("auto", "exact", "low-rank")
    ]
    assert choices[0] == choices[1] != choices[2]
    assert parse_select({"groups": granularity}).window_rank(2 * 10**9) == 16


def test_a_parameter_without_a_gradient_is_left_out_by_name(bert):
    bert.bert.unused = nn.Linear(20, 20)
    with pytest.warns(UserWarning, match=r"left out, .*bert\.unused\.weight"):
        subset = adapeft.select(
            bert, make_batches(bert), groups="tensor", budget="50%", measure="low-rank", rank=4, warmup_steps=4
        )
    assert not any("unused" in name for name in subset.parts)


def test_tied_weights_have_one_window():
    model = make_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    with looking(model, "row", 3) as (passes, groups):
        windows = passes.shards.windows
        index = [info.name for info in groups.parameters].index("transformer.wte.weight")
        assert index in windows.matrices
        leaf = windows.names[index].rpartition(".")[2]
        assert getattr(model.lm_head, leaf) is getattr(model.transformer.wte, leaf)


def test_every_expert_has_a_window_of_its_own():
    with looking(make_mixtral(), "tensor", 5) as (passes, groups):
        windows = passes.shards.windows
        experts = [index for index, info in enumerate(groups.parameters) if len(info.shape) == 3]
        assert len(experts) == 4
        assert set(experts) <= set(windows.matrices)
        assert all(len(windows.right_of(index)) == 3 for index in experts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measure": "low-rank", "probe_steps": 4}, "probe_steps = 4 needs the gradient of every single element"),
        ({"measure": "low-rank", "groups": "tensor", "curvature": "parabola"}, "curvature = parabola needs"),
        ({"measure": "exact", "rank": 8}, "rank = 8: the measurement is exact and has no rank"),
        ({"probe_steps": 4, "rank": 8}, "rank = 8: the measurement is exact and has no rank"),
        ({"rank": 0}, "select.rank = 0: should be greater than 0"),
    ],
)
def test_refused(options, said):
    with pytest.raises(AdapeftError, match=said):
        parse_select(options)


def test_a_rank_wider_than_every_layer_is_refused(bert):
    with pytest.raises(AdapeftError, match=r"select\.rank = 500: no matrix among the candidates is wider"):
        adapeft.select(bert, make_batches(bert), measure="low-rank", rank=500)
    assert not any("leaf" in name for name, _ in bert.named_parameters())


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_resumed_sums_give_the_same_statistics(tmp_path, granularity):
    class StoppedError(Exception):
        pass

    def measured(stop_after: int | None) -> dict[str, np.ndarray]:
        model = make_bert().eval()
        with looking(model, granularity, 3) as (passes, groups):
            done = []

            def progress(name: str, step: int, total: int) -> None:
                done.append(name)
                if len(done) == stop_after:
                    raise StoppedError

            saved = PartialSums(tmp_path, {"key": 1}, 1e-9, OneRank())
            passes = replace(passes, saved=saved, progress=progress)
            settings = parse_select({"groups": granularity, "measure": "low-rank", "rank": 3, "warmup_steps": 0})
            return get_method("adapeft").measure(passes, groups, settings).columns

    whole = measured(None)
    for stop_after in (2, 4, 7, 9):
        shutil.rmtree(tmp_path / "partial-sums", ignore_errors=True)
        with pytest.raises(StoppedError):
            measured(stop_after)
        resumed = measured(None)
        assert all(np.array_equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("scale", [1.0, *SCALES])
def test_a_matrix_whose_gradient_is_rounding_has_no_direction(bert, scale):
    """Make the keys so small that the queries' gradient is far below the others'."""
    with torch.no_grad():
        bert.bert.encoder.layer[0].attention.self.key.weight.mul_(1e-9)
    with directed(bert.eval(), "row", 3, scale=scale) as found:
        sizes = {
            info.name: float(step.square().mean().sqrt())
            for info, step in zip(found.groups.parameters, found.dense, strict=True)
        }
    assert sizes["bert.encoder.layer.0.attention.self.query.weight"] < 1e-2
    assert sizes["bert.encoder.layer.0.attention.self.value.weight"] > 0.1
