"""Any ZeRO stage, world size, uneven shards and accumulation give plain torch's statistics and the same subset."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from adapeft.measure.exact.parabola import LEAST_R2
from adapeft.measure.groups import groups_of
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.mode import measuring_mode
from adapeft.measure.shards.shards import WholeModel
from tests.on_ranks.statistics import (
    FAST,
    MODELS,
    RUNS,
    measure_case,
    rank_for,
    settings_for,
    whole_elements,
)
from tests.support.ranks import needed, run_on_ranks, with_slow

pytestmark = pytest.mark.ranks


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def measured(request, tmp_path_factory):
    """The folder of results measured on this many ranks, and their number."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    run_on_ranks(request.param, "tests.on_ranks.statistics", folder, needed(request))
    return folder, request.param


@pytest.fixture(scope="module")
def plain():
    """A function of model and case that measures them in one process with plain torch."""

    @cache
    def measured_plainly(name, case):
        model = MODELS[name]()
        groups = groups_of(model, settings_for(case))
        with (
            measuring_mode(model, restore=groups.always_train),
            seen(model, groups, rank_for(case, groups), seed=3) as view,
        ):
            shards = view.shards(WholeModel(model, view.names, groups.always_train))
            statistics, chosen, verdict = measure_case(model, shards, groups, case)
        return statistics, whole_elements(statistics, shards.ranks), chosen, verdict

    return measured_plainly


def rounding_alone(groups, elements):
    """Return parameters whose statistics are zero except for rounding, such as the bias of keys under softmax.

    Their largest element is random, and a choice per tensor has to take one.
    """
    if not elements:
        return set()
    sizes = [info.count for info in groups.parameters]
    largest = torch.stack(
        [torch.stack([piece.abs().max() for piece in column.split(sizes)]) for column in elements.values()]
    )
    small = (largest < 1e-5 * largest.max(dim=1, keepdim=True).values).all(dim=0)
    return {info.name for info, is_small in zip(groups.parameters, small, strict=True) if is_small}


@pytest.mark.parametrize("run", with_slow(FAST, RUNS))
def test_sharding_changes_rounding_only(measured, plain, run):
    folder, world_size = measured
    name, case, stage, micro_batch_size = run
    found = torch.load(folder / f"{name}-{case}-{stage}-{micro_batch_size}.pt", weights_only=False)
    statistics, elements, chosen, verdict = plain(name, case)

    # Differences of float32 losses have fewer correct digits than gradients.
    rtol, atol = (2e-2, 2e-2) if case == "parabola" else (1e-4, 2e-5)
    assert found["columns"].keys() == statistics.columns.keys()
    for column, expected in statistics.columns.items():
        actual = found["columns"][column]
        if column == "r2":  # the r² of a fit to noise is noise
            assert ((actual < LEAST_R2) == (expected < LEAST_R2)).all()
            actual, expected = (np.maximum(each, LEAST_R2) for each in (actual, expected))
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol * np.abs(expected).max())
    assert found["elements"].keys() == elements.keys()
    for column, expected in elements.items():
        torch.testing.assert_close(
            found["elements"][column], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )

    assert found["chosen"].keys() == chosen.keys()
    for parameter, part in chosen.items():
        other = found["chosen"][parameter]
        assert (other.describe(), other.count) == (part.describe(), part.count)
        if part.is_indexed and parameter not in rounding_alone(statistics.groups, elements):
            assert torch.equal(other.indices, part.indices)
    if statistics.options is not None:
        for name, expected in vars(statistics.options).items():
            atol = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(getattr(found["options"], name), expected, rtol=1e-3, atol=atol)

    assert [number is None for number in found["verdict"]] == [number is None for number in verdict]
    for number, expected in zip(found["verdict"], verdict, strict=True):
        assert expected is None or number == pytest.approx(expected, rel=2e-2, abs=1e-3)

    assert all(found["restored"])

    if case in ("row", "sam", "fish", "snip") and micro_batch_size is None:
        assert 0 < found["live_gradients"] <= 3  # gloo frees what it has sent a moment later

    # No rank holds statistics or optimizer state of another, or weights, moments or gradients of what is only measured.
    total = int(statistics.groups.counts.sum())
    if case.startswith("low-rank"):  # the leaves are divided
        total = sum(found["held"])
    assert sum(found["held"]) == total
    assert max(found["held"]) < 1.5 * total / world_size
    assert found["state_elements"] <= 3 * found["always_trained"] / world_size + 16
