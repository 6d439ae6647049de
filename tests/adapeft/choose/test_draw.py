"""Uniform draws of single elements."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from adapeft.choose.draw import draw_elements, drawing_bytes
from adapeft.measure.groups import Groups, ParameterInfo


def elements(total):
    return Groups((ParameterInfo("w", (total,), "w", 0, 0.0, None),), "element", total)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 200, 399, 400])
def test_every_number_is_drawn_equally_often(count):
    """Below a fiftieth and above, up to all of them."""
    total, repeats = 400, 2000
    groups, drawn, first = elements(total), np.zeros(total), np.zeros(total)
    for seed in range(repeats):
        positions = draw_elements(groups, count, seed)
        assert len(np.unique(positions)) == len(positions) == count
        drawn[positions] += 1
        first[positions[:1]] += 1
    share = count / total
    assert np.abs(drawn - repeats * share).max() <= 5 * np.sqrt(repeats * share * (1 - share))
    if count:  # in random order: any of them comes first, 5 times each
        assert first.max() <= 20
        assert np.abs(first[:200].sum() - repeats / 2) <= 5 * np.sqrt(repeats / 4)


def test_a_seed_draws_the_same_numbers():
    for count in (100, 3000):
        assert draw_elements(elements(10_000), count, 3).tolist() == draw_elements(elements(10_000), count, 3).tolist()
        assert draw_elements(elements(10_000), count, 3).tolist() != draw_elements(elements(10_000), count, 4).tolist()


@pytest.mark.parametrize("share", [0.01, 0.03, 0.5, 0.9])
def test_a_draw_takes_as_much_memory_as_estimated(share):
    total = 2_000_000
    groups, count = elements(total), int(share * total)
    tracemalloc.start()
    draw_elements(groups, count, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 * drawing_bytes(total, count) <= peak <= 1.1 * drawing_bytes(total, count)
