"""Autograd functions of modules with leaves, without a dense gradient or a saved dense sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adapeft.parts.rule import Ruled

Block = tuple[Tensor, Tensor, Tensor]
"""Rows, columns, and the elements' flat positions in the block of both; int64 each."""


class ElementsLinear(torch.autograd.Function):
    """x (W + S)ᵀ + b, where S is zero except for the leaf at flat ``indices`` of W.

    Saves the parameter W and not the sum: under ZeRO-3 the backward hook gathers W again, and otherwise the sum would
    be a second copy of every trained matrix for the duration of a step. The leaf's gradient is taken from that of the
    rows and columns that contain its elements, or from a transient dense gradient if they cover most of W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        indices: Tensor,
        block: Block | None,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, leaf, indices)
        ctx.block, ctx.transposed = block, transposed
        return F.linear(x, _sum_of(weight, leaf, indices, transposed), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, leaf, indices = ctx.saved_tensors
        needs_x, _, needs_bias, needs_leaf, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_leaf = None
        if needs_x:
            grad_x = grad @ _sum_of(weight, leaf, indices, ctx.transposed).to(grad.dtype)
        if needs_leaf:
            inputs = x.reshape(-1, x.shape[-1]).to(grad.dtype)
            # In the order in which W [first, second] is stored.
            first, second = (inputs, rows) if ctx.transposed else (rows, inputs)
            places = indices
            if ctx.block is not None:
                some_rows, some_columns, places = ctx.block
                first, second = first.index_select(1, some_rows), second.index_select(1, some_columns)
            grad_leaf = (first.t() @ second).flatten()[places].to(leaf.dtype)
        return grad_x, None, rows.sum(0) if needs_bias else None, grad_leaf, None, None, None


def _sum_of(weight: Tensor, leaf: Tensor, indices: Tensor, transposed: bool) -> Tensor:
    dense = weight.detach().flatten().index_add(0, indices, leaf.to(weight.dtype)).view(weight.shape)
    return dense.t() if transposed else dense


class Effective(torch.autograd.Function):
    """The difference that a dense part adds; saves only the leaves, for the same reason as ``ElementsLinear``."""

    @staticmethod
    def forward(ctx: Any, ruled: Ruled, training: bool, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        ctx.ruled, ctx.training = ruled, training
        return ruled.effective(leaves, training).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        effective, leaves = _effective_again(ctx.ruled, ctx.saved_tensors, ctx.training)
        return None, None, *torch.autograd.grad(effective, leaves, grad.to(effective.dtype))


class DenseLinear(torch.autograd.Function):
    """x (W + E)ᵀ + b, where the rule computes E from the leaves; saves the parameters but neither E nor the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ruled: Ruled,
        training: bool,
        transposed: bool,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *leaves)
        ctx.ruled, ctx.training, ctx.transposed = ruled, training, transposed
        total = weight + ruled.effective(leaves, training).to(weight.dtype)
        return F.linear(x, total.t() if transposed else total, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *leaves = ctx.saved_tensors
        effective, leaves = _effective_again(ctx.ruled, leaves, ctx.training)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            total = (weight + effective.to(weight.dtype)).to(grad.dtype)
            grad_x = grad @ (total.t() if ctx.transposed else total)
        inputs = x.reshape(-1, x.shape[-1]).to(grad.dtype)
        dense = inputs.t() @ rows if ctx.transposed else rows.t() @ inputs
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        gradients = torch.autograd.grad(effective, leaves, dense.to(effective.dtype))
        return grad_x, None, grad_bias, None, None, None, *gradients


def _effective_again(ruled: Ruled, leaves: Sequence[Tensor], training: bool) -> tuple[Tensor, list[Tensor]]:
    """Recompute the difference that ``ruled`` added in the forward pass, and return it with the leaves it depends on.

    The random draws are the same because the step is.
    """
    with torch.enable_grad():
        again = [leaf.detach().requires_grad_() for leaf in leaves]
        return ruled.effective(again, training), again
