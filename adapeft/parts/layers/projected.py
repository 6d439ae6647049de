"""Autograd functions of windows: leaves that stay at zero, whose gradients are projections of a weight's.

Windows may be replaced between two backward passes through one graph; each pass looks through those of its time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Projected(torch.autograd.Function):
    r"""The output of a linear layer; leaves that stay at zero get projections of the weight's gradient.

    The right leaf [out, m] gets :math:`g V` and the left leaf [in, m] gets :math:`g^\top \Omega` for the weight's
    gradient :math:`g = \sum_t \delta_t x_t^\top`, in two thin products each. What autograd would compute besides is
    zero, because the leaves are: what they add to the output, and their part of the gradient of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        right: Tensor,
        right_window: Tensor,
        left: Tensor | None,
        left_window: Tensor | None,
    ) -> Tensor:
        # The right side alone needs only what it sees of x, and then its window stays.
        ctx.save_for_backward(x @ right_window.to(x.dtype) if left is None else x)
        ctx.windows, ctx.dtype = (right_window, left_window), right.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        right_window, left_window = ctx.windows
        rows, kept = grad.reshape(-1, grad.shape[-1]), kept.reshape(-1, kept.shape[-1]).to(grad.dtype)
        grad_left = None
        if left_window is not None:
            grad_left = _thin(kept, rows @ left_window.to(grad.dtype)).to(ctx.dtype)
            kept = kept @ right_window.to(grad.dtype)
        return grad, None, _thin(rows, kept).to(ctx.dtype), None, grad_left, None


def _thin(wide: Tensor, narrow: Tensor) -> Tensor:
    """Return the product [n, m] of the transpose of ``wide`` [T, n] and ``narrow`` [T, m].

    Written so that the narrow matrix is the transposed one: on a CPU a fifth faster in bfloat16 and a third in float32.
    """
    return (narrow.t() @ wide).t()


class ProjectedWeight(torch.autograd.Function):
    """A weight [..., out, in], or its transpose; otherwise as ``Projected``, from the transient dense gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        transposed: bool,
        right: Tensor,
        right_window: Tensor,
        left: Tensor | None,
        left_window: Tensor | None,
    ) -> Tensor:
        ctx.windows, ctx.dtype, ctx.transposed = (right_window, left_window), right.dtype, transposed
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        right_window, left_window = ctx.windows
        dense = grad.mT if ctx.transposed else grad
        grad_right = (dense @ right_window.to(grad.dtype)).to(ctx.dtype)
        grad_left = None if left_window is None else (dense.mT @ left_window.to(grad.dtype)).to(ctx.dtype)
        return None, None, grad_right, None, grad_left, None


class ProjectedLookUp(torch.autograd.Function):
    """Embeddings of tokens, rows of a weight [out, in]; otherwise as ``Projected``."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        tokens: Tensor,
        padding_idx: int | None,
        right: Tensor,
        right_window: Tensor,
        left: Tensor | None,
        left_window: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.windows, ctx.padding_idx = (right_window, left_window), padding_idx
        ctx.dtype, ctx.num_rows = right.dtype, len(right)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        right_window, left_window = ctx.windows
        tokens, rows = tokens.flatten(), grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        if ctx.padding_idx is not None:  # nn.Embedding gives the padding row no gradient
            rows = rows.masked_fill(tokens.eq(ctx.padding_idx).unsqueeze(-1), 0.0)
        seen = rows @ right_window.to(ctx.dtype)
        grad_right = seen.new_zeros(ctx.num_rows, seen.shape[-1]).index_add_(0, tokens, seen)
        grad_left = None if left_window is None else _thin(rows, left_window.to(ctx.dtype)[tokens])
        return grad, None, None, grad_right, None, grad_left, None


FUNCTIONS = (Projected, ProjectedWeight, ProjectedLookUp)
