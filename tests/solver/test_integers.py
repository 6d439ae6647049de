"""Scaling to integers never rounds down and never overflows."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from solver.integers import ScaledValues


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1.0, 1e12, 1e250])
@pytest.mark.parametrize("num_items", [1, 3, 1000])
def test_integers_bound_the_values_from_above_within_one_unit(scale: float, num_items: int):
    values = np.random.default_rng(0).lognormal(0, 5, num_items) * scale
    scaled = ScaledValues.of(values)

    unit = Fraction(2) ** -scaled.exponent
    for value, integer in zip(values.tolist(), scaled.integers.tolist(), strict=True):
        assert 0 <= integer * unit - Fraction(value) < unit
    assert 2**60 <= sum(scaled.integers.tolist()) < 2**62
    assert scaled.real(sum(scaled.integers.tolist())) == pytest.approx(values.sum(), rel=1e-12)
