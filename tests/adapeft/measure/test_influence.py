"""The influence formula: its limits, its continuity and its values at zero."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapeft.measure.influence import influence, planned_reach

positive = st.floats(1e-6, 1e6)


def value(slope, curvature, reach):
    return float(influence(*torch.tensor([slope, curvature], dtype=torch.float64), reach))


@given(positive, positive, positive)
def test_is_the_best_decrease_of_the_parabola_within_reach(slope, curvature, reach):
    step = min(reach, slope / curvature)
    assert value(slope, curvature, reach) == pytest.approx(step * slope - 0.5 * step**2 * curvature, rel=1e-9)


@given(positive, positive)
def test_is_continuous_where_the_reach_meets_the_optimum(slope, curvature):
    at = slope / curvature
    below, above = value(slope, curvature, at * (1 - 1e-9)), value(slope, curvature, at * (1 + 1e-9))
    assert below == pytest.approx(above, rel=1e-8)
    assert value(slope, curvature, at) == pytest.approx(slope**2 / (2 * curvature), rel=1e-8)


@given(positive, positive)
def test_ends(slope, curvature):
    assert value(slope, curvature, math.inf) == pytest.approx(slope**2 / (2 * curvature))
    tiny = 1e-9 * slope / curvature
    assert value(slope, curvature, tiny) / tiny == pytest.approx(slope)


@given(positive, positive, positive, st.floats(1, 100))
def test_never_falls_with_the_reach(slope, curvature, reach, factor):
    assert value(slope, curvature, reach * factor) >= value(slope, curvature, reach) * (1 - 1e-12)
    assert value(slope, curvature, math.inf) >= value(slope, curvature, reach) * (1 - 1e-12)


@pytest.mark.parametrize("reach", [0.1, math.inf])
@pytest.mark.parametrize("slope", [0.0, -1.0])
def test_a_slope_that_is_not_positive_promises_nothing(slope, reach):
    for curvature in (0.0, 2.0):
        assert value(slope, curvature, reach) == 0


def test_no_curvature():
    assert value(3.0, 0.0, 0.1) == pytest.approx(0.3), "a finite reach bounds the claim"
    assert value(3.0, 0.0, math.inf) == 0, "nothing does"


def test_is_elementwise_for_any_shape():
    slope, curvature = torch.tensor([[1.0, -1.0], [2.0, 0.0]]), torch.tensor([[4.0, 4.0], [1.0, 1.0]])
    expected = torch.tensor([[0.125, 0.0], [1.5, 0.0]])
    torch.testing.assert_close(influence(slope, curvature, 1.0), expected)


def test_planned_reach():
    assert planned_reach(20 * 1e-3, 20) == pytest.approx(20 * 1e-3 * 0.3)
    assert planned_reach(60 * 1e-3, 60) == pytest.approx(60 * 1e-3 * 0.1)
    assert planned_reach(3e-3, 3) == pytest.approx(3e-3), "no more than the learning rates add up to"
    assert planned_reach(0.0, 0) == 0
