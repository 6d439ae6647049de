"""Windows show projections of a weight's gradient, and cost only the products that these need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from adapeft.parts.layers.leaves import add_leaves
from adapeft.parts.window import Window

TOKENS, INPUTS, OUTPUTS, RANK = 20, 32, 48, 4


def windowed(layer: nn.Module, has_left: bool) -> tuple[dict[str, nn.Parameter], Tensor, Tensor]:
    """Put a window on a frozen layer; return its leaves, Ω and V."""
    layer.requires_grad_(False)
    dtype = layer.weight.dtype
    left, right = (torch.randn(size, RANK, dtype=dtype) for size in (OUTPUTS, INPUTS))
    window = Window(1 if isinstance(layer, Conv1D) else 0, left, right)
    window.has_left = has_left
    leaves = {
        "left": nn.Parameter(torch.zeros(INPUTS, RANK, dtype=dtype)),
        "right": nn.Parameter(torch.zeros(OUTPUTS, RANK, dtype=dtype)),
    }
    add_leaves(layer, "weight", window, leaves)
    return leaves, left, right


@pytest.mark.parametrize("make", [lambda: nn.Linear(INPUTS, OUTPUTS), lambda: Conv1D(OUTPUTS, INPUTS)])
@pytest.mark.parametrize("has_left", [True, False])
def test_leaves_get_the_projections_of_the_gradient(make, has_left):
    layer = make().double()
    x = torch.randn(2, TOKENS // 2, INPUTS, dtype=torch.float64, requires_grad=True)
    expected = layer(x)
    loss = expected.sin().sum()
    gradient, of_x = torch.autograd.grad(loss, [layer.weight, x])
    gradient = gradient.t() if isinstance(layer, Conv1D) else gradient

    leaves, left, right = windowed(layer, has_left)
    output = layer(x)
    assert torch.equal(output, expected)
    output.sin().sum().backward()
    torch.testing.assert_close(x.grad, of_x)
    torch.testing.assert_close(leaves["right"].grad, gradient @ right)
    if has_left:
        torch.testing.assert_close(leaves["left"].grad, gradient.t() @ left)
    else:
        assert leaves["left"].grad is None


@pytest.mark.parametrize("has_left", [True, False])
def test_a_side_costs_two_thin_products(has_left):
    layer = nn.Linear(INPUTS, OUTPUTS)
    windowed(layer, has_left)
    x = torch.randn(TOKENS, INPUTS, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    frozen = 2 * (2 * TOKENS * INPUTS * OUTPUTS)  # the output, and the gradient of x
    side = 2 * TOKENS * RANK * (INPUTS + OUTPUTS)
    assert counter.get_total_flops() == frozen + (2 if has_left else 1) * side


def test_a_pass_without_gradients_has_no_product():
    layer = nn.Linear(INPUTS, OUTPUTS)
    windowed(layer, True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(TOKENS, INPUTS))
    assert counter.get_total_flops() == 2 * TOKENS * INPUTS * OUTPUTS
