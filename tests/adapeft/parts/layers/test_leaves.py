"""Tests of leaves against a dense oracle: the same module with parameter plus leaf, its gradient gathered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from adapeft.parts.elements import Elements
from adapeft.parts.layers.leaves import add_leaves, remove_leaves
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.rule import DIFFERENCE
from tests.oracles.leaves import densify, gather


class Experts(nn.Module):
    """Raw parameters, one of them 3-D as in mixtures of experts, read in two ways."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x * self.scale, self.weight * self.weight)


class OwnLinear(nn.Linear):
    """A subclass that computes something else from the weight, so the fast path of nn.Linear would be wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.abs(), self.bias)


def elements(shape: tuple[int, ...]) -> Part:
    count = torch.Size(shape).numel()
    return Elements(shape, torch.arange(0, count, 3 if count > 9 else 2))


def few(shape: tuple[int, ...]) -> Part:
    """Return a part of two rows and two columns: three of the four elements where these cross."""
    return Elements(shape, torch.tensor([1, 3, shape[1] * (shape[0] - 1) + 1]))


def rows(shape: tuple[int, ...], dim: int = 0) -> Part:
    return Rows(shape, torch.tensor(sorted({0, 2, shape[dim] - 1})), dim)


FLOATS, TOKENS = "floats", "tokens"
# what: (module, {parameter: part}, input)
CASES = {
    "linear elements": (lambda: nn.Linear(4, 6), {"weight": elements((6, 4))}, FLOATS),
    "linear elements no bias": (lambda: nn.Linear(4, 6, bias=False), {"weight": elements((6, 4))}, FLOATS),
    "linear few elements": (lambda: nn.Linear(4, 6), {"weight": few((6, 4))}, FLOATS),
    "linear rows": (lambda: nn.Linear(4, 6), {"weight": rows((6, 4))}, FLOATS),
    "linear rows no bias": (lambda: nn.Linear(4, 6, bias=False), {"weight": rows((6, 4))}, FLOATS),
    "linear columns": (lambda: nn.Linear(4, 6), {"weight": rows((6, 4), 1)}, FLOATS),
    "linear bias": (lambda: nn.Linear(4, 6), {"bias": elements((6,))}, FLOATS),
    "linear both": (lambda: nn.Linear(4, 6), {"weight": elements((6, 4)), "bias": elements((6,))}, FLOATS),
    "linear rows and bias": (lambda: nn.Linear(4, 6), {"weight": rows((6, 4)), "bias": elements((6,))}, FLOATS),
    "linear subclass": (lambda: OwnLinear(4, 6), {"weight": rows((6, 4))}, FLOATS),
    "conv1d elements": (lambda: Conv1D(6, 4), {"weight": elements((4, 6))}, FLOATS),
    "conv1d few elements": (lambda: Conv1D(6, 4), {"weight": few((4, 6))}, FLOATS),
    "conv1d neurons": (lambda: Conv1D(6, 4), {"weight": rows((4, 6), 1)}, FLOATS),
    "conv1d inputs": (lambda: Conv1D(6, 4), {"weight": rows((4, 6), 0)}, FLOATS),
    "conv1d bias": (lambda: Conv1D(6, 4), {"bias": elements((6,))}, FLOATS),
    "embedding rows": (lambda: nn.Embedding(7, 4), {"weight": rows((7, 4))}, TOKENS),
    "embedding columns": (lambda: nn.Embedding(7, 4), {"weight": rows((7, 4), 1)}, TOKENS),
    "embedding elements": (lambda: nn.Embedding(7, 4), {"weight": elements((7, 4))}, TOKENS),
    "padded embedding rows": (lambda: nn.Embedding(7, 4, padding_idx=2), {"weight": rows((7, 4))}, TOKENS),
    "padded embedding elements": (lambda: nn.Embedding(7, 4, padding_idx=2), {"weight": elements((7, 4))}, TOKENS),
    "layer norm": (lambda: nn.LayerNorm(4), {"weight": elements((4,)), "bias": elements((4,))}, FLOATS),
    "experts elements": (lambda: Experts(), {"weight": elements((3, 6, 4))}, FLOATS),
    "experts": (lambda: Experts(), {"weight": rows((3, 6, 4)), "scale": elements((4,))}, FLOATS),
    "expert neurons": (lambda: Experts(), {"weight": rows((3, 6, 4), 1)}, FLOATS),
}
LINEAR = [what for what in CASES if what.startswith(("linear", "conv1d"))]


def build(what: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, dict[str, Part]]:
    """Return the base, the same with leaves of random values, and the parts."""
    make, parts, _ = CASES[what]
    torch.manual_seed(0)
    base = make().to(dtype)
    for parameter in base.parameters():  # Conv1D's bias and a LayerNorm start at constants
        nn.init.normal_(parameter)
    module = copy.deepcopy(base)
    leaf_dtype = dtype if dtype == torch.float64 else torch.float32
    for name, part in parts.items():
        module.get_parameter(name).requires_grad_(False)
        add_leaves(module, name, part, {DIFFERENCE: nn.Parameter(torch.randn(part.value_shape, dtype=leaf_dtype))})
    return base, module, parts


def summed(base: nn.Module, module: nn.Module, parts: dict[str, Part]) -> nn.Module:
    """Return the oracle: ``base`` with the leaves of ``module`` added to its parameters."""
    oracle = copy.deepcopy(base)
    with torch.no_grad():
        for name, part in parts.items():
            parameter = oracle.get_parameter(name)
            parameter += densify(part, leaf_of(module, name).detach()).to(parameter.dtype)
    return oracle


def leaf_of(module: nn.Module, name: str) -> nn.Parameter:
    return module.get_parameter(f"{name}_leaf")


def an_input(what: str, shape: tuple[int, ...] = (2, 5), dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if CASES[what][2] == TOKENS:
        return (torch.arange(torch.Size(shape).numel()) * 3 % 7).view(shape)  # every token, some of them twice
    return torch.randn(*shape, 4, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def backward(module: nn.Module, x: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the output and the gradient of the input, for a loss whose gradient differs in every output."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(x)
    (output.float() * torch.arange(1.0, output.numel() + 1).view(output.shape).sin()).sum().backward()
    grad, x.grad = x.grad, None
    return output.detach(), grad


@pytest.mark.parametrize("what", CASES)
def test_forward_and_gradients_equal_the_dense_sum(what):
    base, module, parts = build(what)
    oracle = summed(base, module, parts)
    x = an_input(what)
    output, grad = backward(module, x)
    expected, expected_grad = backward(oracle, x)
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, base(x)), "the leaf must matter"
    if grad is not None:
        torch.testing.assert_close(grad, expected_grad)
    for name, parameter in oracle.named_parameters():
        own = module.get_parameter(name)
        if name in parts:
            assert own.grad is None, "a dense gradient of the frozen weight"
            torch.testing.assert_close(leaf_of(module, name).grad, gather(parts[name], parameter.grad))
        else:
            torch.testing.assert_close(own.grad, parameter.grad)


@pytest.mark.parametrize("what", CASES)
def test_removing_leaves_gives_the_module_back(what):
    base, module, parts = build(what)
    remove_leaves(module)
    for name in parts:
        module.get_parameter(name).requires_grad_(True)
    assert type(module) is type(base)
    assert module.__dict__.keys() == base.__dict__.keys()
    assert module._non_persistent_buffers_set == base._non_persistent_buffers_set == set()
    assert module.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(module(an_input(what)), base(an_input(what)))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5)])
@pytest.mark.parametrize("what", LINEAR)
def test_inputs_of_any_rank(what, shape):
    base, module, parts = build(what)
    oracle = summed(base, module, parts)
    x = an_input(what, shape)
    for ours, expected in zip(backward(module, x), backward(oracle, x), strict=True):
        torch.testing.assert_close(ours, expected)
    for name, part in parts.items():
        torch.testing.assert_close(leaf_of(module, name).grad, gather(part, oracle.get_parameter(name).grad))


@pytest.mark.parametrize("what", CASES)
def test_inputs_that_are_not_contiguous(what):
    _, module, _ = build(what)
    x = an_input(what, (5, 2)).detach().transpose(0, 1)
    assert not x.is_contiguous()
    torch.testing.assert_close(module(x), module(x.contiguous()))


def test_gradients_that_are_not_contiguous():
    _, module, _ = build("linear elements")
    x = an_input("linear elements", (2, 3))
    module(x).transpose(0, 2).sin().sum().backward()
    expected, leaf = leaf_of(module, "weight").grad.clone(), leaf_of(module, "weight")
    leaf.grad = None
    module(x).sin().sum().backward()
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize(
    "what",
    [
        *("linear elements", "linear both", "conv1d elements", "linear elements no bias"),
        *("linear few elements", "conv1d few elements"),
    ],
)
def test_gradcheck(what):
    _, module, parts = build(what)
    leaves = [leaf_of(module, name) for name in parts]
    others = [parameter for name, parameter in module.named_parameters() if parameter.requires_grad]

    def output(x: Tensor, *_: Tensor) -> Tensor:
        return module(x)

    assert len(others) >= len(leaves)
    torch.autograd.gradcheck(output, (an_input(what, (3,)), *others))


@pytest.mark.parametrize("what", CASES)
def test_a_bfloat16_model_keeps_float32_leaves(what):
    base, module, parts = build(what, torch.bfloat16)
    oracle = summed(base, module, parts).float()
    x = an_input(what, dtype=torch.bfloat16)
    output, _ = backward(module, x)
    expected, _ = backward(oracle, x.detach().float() if x.is_floating_point() else x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.2)
    for name, part in parts.items():
        grad = leaf_of(module, name).grad
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, gather(part, oracle.get_parameter(name).grad), rtol=0.05, atol=0.3)


@pytest.mark.parametrize("what", CASES)
def test_autocast(what):
    base, module, parts = build(what, torch.float32)
    oracle, x = summed(base, module, parts), an_input(what, dtype=torch.float32)
    output, grad = backward(module, x, autocast=True)
    expected, expected_grad = backward(oracle, x, autocast=True)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.1)
    if grad is not None:
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected_grad, rtol=0.05, atol=0.1)
    for name, part in parts.items():
        torch.testing.assert_close(
            leaf_of(module, name).grad, gather(part, oracle.get_parameter(name).grad), rtol=0.05, atol=0.1
        )


@pytest.mark.parametrize("what", CASES)
def test_gradient_checkpointing_gives_equal_gradients(what):
    _, module, parts = build(what)
    x = an_input(what)
    backward(module, x)
    plain = [leaf_of(module, name).grad.clone() for name in parts]
    module.zero_grad()
    backward(lambda x: checkpoint(module, x, use_reentrant=False), x)
    for name, expected in zip(parts, plain, strict=True):
        assert torch.equal(leaf_of(module, name).grad, expected)


@pytest.mark.parametrize("what", ["linear elements", "linear rows", "conv1d elements", "conv1d neurons"])
def test_nothing_as_large_as_the_weight_is_saved_but_the_weight(what):
    _, module, _ = build(what)
    weight = module.get_parameter("weight")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(an_input(what, (1,)))
    large = [tensor for tensor in saved if tensor.numel() >= weight.numel()]
    assert large
    assert all(tensor.data_ptr() == weight.data_ptr() for tensor in large)


@pytest.mark.parametrize(("count", "products"), [(0, 2), (9, 2), (2048, 3)])
def test_few_elements_cost_no_gradient_of_the_whole_weight(count, products):
    """Products of the size of the weight: the output, the input's gradient and, for many elements, their gradient."""
    part = Elements((64, 64), torch.linspace(0, 4095, count).long())
    module = nn.Linear(64, 64).requires_grad_(False)
    add_leaves(module, "weight", part, {DIFFERENCE: nn.Parameter(torch.zeros(part.value_shape))})
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(10, 64, requires_grad=True)).sum().backward()
    assert round(counter.get_total_flops() / (2 * 10 * 64 * 64)) == products


def test_a_forward_that_fails_leaves_no_sum_behind():
    _, module, _ = build("experts")
    with pytest.raises(RuntimeError):
        module(torch.ones(2, 3, dtype=torch.float64))
    assert "weight" not in module.__dict__
    assert module.get_parameter("weight") is module._parameters["weight"]


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: nn.LayerNorm(6)])
def test_a_module_whose_bias_is_divided_can_be_described(make):
    """DeepSpeed prints the model while it sets up ZeRO-3; what is left of a divided bias has none of the elements."""
    module = make()
    described = module.extra_repr()
    part = Elements((6,), torch.tensor([1, 5]))
    add_leaves(module, "bias", part, {DIFFERENCE: nn.Parameter(torch.zeros(2))})
    module._parameters["bias"].data = torch.empty(0)
    assert module.extra_repr() == described
    with pytest.raises(IndexError):
        _ = module.bias
