"""Tests that values independent of the weights equal those on real tensors, and that all others are unknown."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from adapeft.model.unloaded.weightless import BeyondTableError, UnknownValueError, Weightless


def positions(mask):
    """Count positions as RoBERTa does."""
    return torch.cumsum(mask, dim=1) * mask + 1


def windows(mask):
    """Write into views, and use floats."""
    grid = torch.zeros(mask.shape[1], mask.shape[1])
    grid[1:, :-1].fill_(2)
    grid.diagonal().add_(torch.arange(mask.shape[1]) / 3)
    return grid.triu(-1) * mask.sum()


def chosen(mask):
    """Return a tensor whose shape depends on values."""
    return torch.arange(mask.numel()).view_as(mask)[mask.bool()]


def looped(mask):
    """Use bounds and branches that depend on values."""
    total = torch.zeros((), dtype=torch.int64)
    for start in range(int(mask.sum(1).min())):
        if bool((mask[:, start] == 1).all()):
            total = total + start
    return torch.full_like(mask, int(total)).new_ones(3) + torch.unique_consecutive(mask).sum()


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize("code", [positions, windows, chosen, looped])
@pytest.mark.parametrize("on_meta", [True, False])
def test_values_are_those_of_real_tensors(code, on_meta):
    weightless = Weightless()
    if on_meta:
        with weightless, torch.device("meta"):
            found = code(weightless.known(MASK))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True), weightless:
            found = code(MASK)
    torch.testing.assert_close(weightless.value(found), code(MASK), rtol=0, atol=0)


def test_what_weights_decide_is_unknown():
    weightless = Weightless()
    with weightless, torch.device("meta"):
        layer = torch.nn.Linear(3, 2)  # its bias and weight are initialized in place
        ones = torch.ones(2, 3)
        out = layer(ones)
        drawn = torch.rand(3)
        mixed = torch.arange(4.0)
        mixed[:2].copy_(drawn[:2])
    for tensor in (layer.weight, layer.bias, out, drawn, mixed):
        assert weightless.value(tensor) is None
    assert weightless.value(ones).tolist() == [[1.0] * 3] * 2
    weightless.forget([ones])
    assert weightless.value(ones) is None
    for needs_value in (lambda: out.max().item(), lambda: ones.nonzero(), lambda: out[out > 0]):
        with weightless, pytest.raises(UnknownValueError):
            needs_value()


def test_a_mask_that_is_unknown_selects_all_as_a_bound():
    weightless = Weightless(selects_all=True)
    with weightless, torch.device("meta"):
        scores = torch.empty(4, 5)
        assert scores[scores > 0].shape == (20,)
        assert (scores > 0).nonzero().shape == (20, 2)
        assert scores.masked_select(scores > 0).shape == (20,)
        with pytest.raises(UnknownValueError):
            scores.sum().item()


@pytest.mark.parametrize(
    ("look", "size"),
    [
        (lambda table, indices: torch.nn.functional.embedding(indices, table), 7),
        (lambda table, indices: table[indices], 7),
        (lambda table, indices: table[:, indices], 3),
        (lambda table, indices: table.index_select(1, indices), 3),
        (lambda table, indices: table.gather(0, indices[:, None].expand(-1, 3)), 7),
    ],
)
def test_indices_are_held_against_their_table(look, size):
    weightless = Weightless()
    with weightless:
        table = torch.empty(7, 3, device="meta")
        look(table, weightless.known(torch.tensor([0, size - 1])))
        with pytest.raises(BeyondTableError, match=rf"index {size} is out of range for a table of {size}") as caught:
            look(table, weightless.known(torch.tensor([size, 0])))
        assert caught.value.table.untyped_storage() is table.untyped_storage()
        with pytest.raises(IndexError):
            look(table, weightless.known(torch.tensor([-size - 1, 0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_of_any_type(dtype):
    """The meta kernel accepts only bfloat16; a CPU also computes float32."""
    real, _ = _grouped(dtype, torch.device("cpu"))
    with Weightless() as weightless:
        found, gradient = _grouped(dtype, torch.device("meta"), weightless.known)
    assert (found.shape, found.dtype) == (real.shape, dtype)
    assert (gradient.shape, gradient.dtype) == ((2, 16, 8), dtype)


def _grouped(dtype, device, known=lambda tensor: tensor):
    x = torch.ones(6, 16, dtype=dtype, device=device)
    weight = torch.ones(2, 16, 8, dtype=dtype, device=device, requires_grad=True)
    offsets = known(torch.tensor([2, 6], dtype=torch.int32))
    out = torch.nn.functional.grouped_mm(x, weight, offs=offsets)
    out.square().sum().backward()
    return out, weight.grad


def test_endless_loops_end():
    weightless = Weightless()
    weightless.most_operations = 10
    for _ in range(2):
        with weightless, torch.device("meta"):
            for _ in range(10):
                torch.ones(1)
            with pytest.raises(UnknownValueError, match="more than 10 operations"):
                torch.ones(1)


def test_large_values_are_not_kept():
    weightless = Weightless()
    with weightless, torch.device("meta"):
        vast = torch.zeros(2**28)
        assert weightless.value(vast) is None
        assert weightless.value(torch.zeros(8)) is not None
