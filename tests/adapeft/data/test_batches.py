"""Index arithmetic: which rank and micro-batch takes which examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapeft.data.batches import draw_calibration, epoch_batches, evaluation_batches, micro_batches, num_micro_batches
from adapeft.errors import AdapeftError


@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 9), st.integers(0, 5))
def test_halves_are_disjoint_and_hold_what_was_asked(num_examples, calibration, batch_size, seed):
    drawn = draw_calibration(num_examples, calibration, batch_size, 1, seed)
    a, b = np.concatenate(drawn.half_a), np.concatenate(drawn.half_b)
    everything = [*a, *b]
    assert len(everything) == len(set(everything)) == min(num_examples, calibration)
    assert 0 <= len(b) - len(a) <= 1
    assert max(len(batch) for batch in drawn.batches) <= batch_size
    assert set(everything) <= set(range(num_examples))


def test_the_draw_depends_on_the_seed_and_not_on_the_ranks():
    def drawn(seed, world_size=1):
        return [batch.tolist() for batch in draw_calibration(50, 20, 4, world_size, seed).batches]

    assert drawn(0) == drawn(0, world_size=8) != drawn(1)


@pytest.mark.parametrize(("num_examples", "calibration", "world_size"), [(1, 10, 1), (7, 10, 8), (100, 3, 4)])
def test_too_few_examples(num_examples, calibration, world_size):
    with pytest.raises(AdapeftError, match=f"select.calibration = {calibration} .* Raise select.calibration"):
        draw_calibration(num_examples, calibration, 4, world_size, 0)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_shares_of_a_batch_are_the_batch(size, world_size, num_micro):
    batch = np.arange(100, 100 + size)
    shares = [micro_batches(batch, rank, world_size, num_micro) for rank in range(world_size)]
    assert all(len(share) == num_micro for share in shares)
    assert [i for share in shares for micro in share for i in micro] == batch.tolist()


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 9))
def test_no_micro_batch_is_larger_than_asked(batch_size, world_size, micro_batch_size):
    num_micro = num_micro_batches(batch_size, world_size, micro_batch_size)
    sizes = [
        len(micro)
        for rank in range(world_size)
        for micro in micro_batches(np.arange(batch_size), rank, world_size, num_micro)
    ]
    assert max(sizes) <= micro_batch_size
    assert num_micro_batches(batch_size, world_size, None) == 1


def test_epochs_hold_every_example_once_in_another_order():
    first, again, second = (epoch_batches(10, 4, 0, epoch) for epoch in (0, 0, 1))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(np.concatenate(first).tolist()) == list(range(10))
    assert np.concatenate(first).tolist() == np.concatenate(again).tolist() != np.concatenate(second).tolist()
    assert np.concatenate(evaluation_batches(10, 4)).tolist() == list(range(10))


def test_batches_of_one_length_hold_every_example_once_with_little_padding():
    lengths = np.random.default_rng(0).integers(1, 100, size=1003)

    def epoch(seed: int, number: int, grouped: bool = True) -> tuple[np.ndarray, ...]:
        return epoch_batches(len(lengths), 16, seed, number, lengths.tolist() if grouped else None)

    def padded(batches: tuple[np.ndarray, ...]) -> int:
        return sum(len(batch) * lengths[batch].max() for batch in batches)

    first = epoch(0, 0)
    assert [len(batch) for batch in first] == [16] * 62 + [11]
    assert sorted(np.concatenate(first).tolist()) == list(range(1003))
    assert padded(first) < 1.2 * lengths.sum() < 1.8 * lengths.sum() < padded(epoch(0, 0, grouped=False))
    orders = [np.concatenate(batches).tolist() for batches in (first, epoch(0, 0), epoch(0, 1), epoch(1, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]
