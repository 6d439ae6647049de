"""Modules that own a leaf: the trained difference of one of their own parameters, or of some rows or elements of it.

A module is turned into a subclass of its own class, so that it keeps its parameters, its name and its hooks: under
ZeRO-3 the module's pre-forward hook gathers weight and leaf together, which a wrapper around another module's weight
would not get. A leaf starts at zero and is all that the optimizer, the gradients and the checkpoints see; weight decay
on it pulls towards the pretrained value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from adapeft.choose.subset import Part
from adapeft.tune.rules.rule import DIFFERENCE, Place, Rule

_SMALLER = 4
"""Times that a block is smaller than its matrix for its gradient to be worth the copies of its rows and columns."""

_Block = tuple[Tensor, Tensor, Tensor]
"""Rows, columns, and the elements' places in the block of both; int64 each."""


@dataclass(frozen=True)
class DensePart:
    """A parameter that trains under a rule: where it is, and the names of its leaves, the difference first."""

    place: Place
    rule: Rule
    leaves: tuple[str, ...]

    def effective(self, leaves: Sequence[Tensor], training: bool) -> Tensor:
        """What the forward pass adds to the parameter."""
        return self.rule.effective(self.place, leaves, training)


def add_leaf(module: nn.Module, name: str, part: Part, leaf: nn.Parameter) -> str:
    """Makes ``leaf`` part of ``module`` as the difference to its parameter ``name`` that ``part`` describes.

    Returns:
        The leaf's name in ``module``.
    """
    assert part.indices is not None
    with_leaves = _with_leaves(module)
    parameter = getattr(module, name)
    module.register_parameter(_leaf_name(name), leaf)
    module.register_buffer(_indices_name(name), part.indices.to(parameter.device), persistent=False)
    if isinstance(with_leaves, _LinearWithLeaves):
        for piece, index in _block_of(part).items():
            module.register_buffer(f"{_indices_name(name)}_{piece}", index.to(parameter.device), persistent=False)
    with_leaves.leaf_parts[name] = (part.kind, part.dim)
    return _leaf_name(name)


def add_dense_leaves(
    module: nn.Module, name: str, part: DensePart, leaves: Mapping[str, nn.Parameter]
) -> dict[str, str]:
    """Makes the ``leaves`` of ``part`` those of ``module``'s parameter ``name``.

    Returns:
        Leaf → its name in ``module``.
    """
    with_leaves = _with_leaves(module)
    for leaf, parameter in leaves.items():
        module.register_parameter(_leaf_name(name, leaf), parameter)
    with_leaves.leaf_parts[name] = ("dense", 0)
    with_leaves.dense_parts[name] = part
    return {leaf: _leaf_name(name, leaf) for leaf in leaves}


def remove_leaves(module: nn.Module) -> None:
    """Gives ``module`` its own class back."""
    if isinstance(module, _WithLeaves):
        for name in module.leaf_parts:
            if name in module.dense_parts:
                for leaf in module.dense_parts[name].leaves:
                    delattr(module, _leaf_name(name, leaf))
                continue
            delattr(module, _leaf_name(name))
            for buffer in [key for key in module._buffers if key.startswith(_indices_name(name))]:
                delattr(module, buffer)
        del module.__dict__["leaf_parts"], module.__dict__["dense_parts"]
        module.__class__ = type(module).__bases__[1]


def leaves_of(module: nn.Module) -> dict[str, dict[str, str]]:
    """Name of each parameter of ``module`` that has leaves → these → their names in ``module``."""
    if not isinstance(module, _WithLeaves):
        return {}
    leaves = {name: part.leaves for name, part in module.dense_parts.items()}
    return {
        name: {leaf: _leaf_name(name, leaf) for leaf in leaves.get(name, (DIFFERENCE,))} for name in module.leaf_parts
    }


def difference_of(
    module: nn.Module, name: str, leaves: Sequence[Tensor], shape: tuple[int, ...]
) -> tuple[Part, Tensor]:
    """What ``leaves`` add to the parameter ``name`` of ``module`` when it does not train, and where.

    Args:
        module: one with leaves.
        name: of the parameter.
        leaves: its leaves in the order of ``leaves_of``.
        shape: of the parameter.
    """
    assert isinstance(module, _WithLeaves)
    kind, dim = module.leaf_parts[name]
    if kind == "dense":
        return Part("tensor", shape), module.dense_parts[name].effective(leaves, training=False)
    return Part(kind, shape, module.leaf(name)[1].cpu(), dim), leaves[0]  # type: ignore[arg-type]


def leaf_shape(part: Part) -> tuple[int, ...]:
    """[k] for elements; for rows the parameter's shape with ``dim`` moved to the front and cut to the chosen rows."""
    assert part.indices is not None
    if part.kind == "elements":
        return (len(part.indices),)
    return (len(part.indices), *part.shape[: part.dim], *part.shape[part.dim + 1 :])


def _block_of(part: Part) -> dict[str, Tensor]:
    """The rows and columns of a matrix that hold its elements, and where these stand in the block of both, flat.

    Empty where that block is not much smaller than the matrix, whose gradient then is gathered from the whole.
    """
    if part.kind != "elements" or len(part.shape) != 2:
        return {}
    assert part.indices is not None
    row, column = part.indices // part.shape[1], part.indices % part.shape[1]
    rows, columns = (torch.bincount(index).nonzero().squeeze(1) for index in (row, column))
    if _SMALLER * len(rows) * len(columns) > math.prod(part.shape):
        return {}
    places = torch.searchsorted(rows, row) * len(columns) + torch.searchsorted(columns, column)
    return {"rows": rows, "columns": columns, "places": places}


def _with_leaves(module: nn.Module) -> _WithLeaves:
    if not isinstance(module, _WithLeaves):
        module.__class__ = _class_with_leaves(type(module))  # type: ignore[arg-type]
        module.__dict__.update(leaf_parts={}, dense_parts={})
    assert isinstance(module, _WithLeaves)
    return module


def _leaf_name(name: str, leaf: str = DIFFERENCE) -> str:
    return f"{name}_leaf" if leaf == DIFFERENCE else f"{name}_leaf_{leaf}"


def _indices_name(name: str) -> str:
    return f"{name}_leaf_indices"


class _WithLeaves(nn.Module):
    """Any module: the parameters that have leaves are replaced for the length of one forward by their sums.

    Correct for whatever the module does with its parameters; the sum is a dense transient.
    """

    leaf_parts: dict[str, tuple[str, int]]
    dense_parts: dict[str, DensePart]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's own class on the sums."""
        sums = {name: self.summed(name) for name in self.leaf_parts}
        # An instance attribute is found before nn.Module's own parameters, which ZeRO's hooks keep seeing.
        self.__dict__.update(sums)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in sums:
                del self.__dict__[name]

    def leaf(self, name: str) -> tuple[Tensor, Tensor]:
        """The leaf of parameter ``name`` and its indices."""
        return self._parameters[_leaf_name(name)], self._buffers[_indices_name(name)]  # type: ignore[return-value]

    def block(self, name: str) -> _Block | None:
        """Of the elements of parameter ``name``, where their gradient is computed on it alone."""
        rows, columns, places = (
            self._buffers.get(f"{_indices_name(name)}_{piece}") for piece in ("rows", "columns", "places")
        )
        return None if rows is None or columns is None or places is None else (rows, columns, places)

    def dense_leaves(self, name: str) -> list[Tensor]:
        """The leaves of the dense part ``name``, in its order."""
        leaves = [self._parameters[_leaf_name(name, leaf)] for leaf in self.dense_parts[name].leaves]
        return leaves  # type: ignore[return-value]

    def summed(self, name: str) -> Tensor:
        """Parameter plus leaf, dense."""
        parameter = self._parameters[name]
        assert parameter is not None
        if name not in self.leaf_parts:
            return parameter
        kind, dim = self.leaf_parts[name]
        if kind == "dense":
            effective = _Effective.apply(self.dense_parts[name], self.training, *self.dense_leaves(name))
            return parameter + effective.to(parameter.dtype)
        leaf, indices = self.leaf(name)
        leaf = leaf.to(parameter.dtype)
        if kind == "elements":
            return parameter.flatten().index_add(0, indices, leaf).view(parameter.shape)
        return parameter.index_add(dim, indices, leaf.movedim(0, dim))


class _LinearWithLeaves(_WithLeaves):
    """``nn.Linear`` and ``Conv1D`` without a dense gradient (rows) or a saved dense sum (elements) of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        transposed = isinstance(self, Conv1D)
        bias = self.summed("bias") if self._parameters.get("bias") is not None else None
        weight = self._parameters["weight"]
        assert weight is not None
        kind, dim = self.leaf_parts.get("weight", ("", 0))
        if kind == "elements":
            return _ElementsLinear.apply(x, weight, bias, *self.leaf("weight"), self.block("weight"), transposed)
        if kind == "dense":
            part, leaves = self.dense_parts["weight"], self.dense_leaves("weight")
            return _DenseLinear.apply(x, weight, bias, part, self.training, transposed, *leaves)
        if kind == "rows" and dim != (1 if transposed else 0):
            return F.linear(x, self.summed("weight").t() if transposed else self.summed("weight"), bias)
        output = F.linear(x, weight.t() if transposed else weight, bias)
        if kind == "rows":
            leaf, rows = self.leaf("weight")
            output = output.index_add(-1, rows, F.linear(x, leaf.to(x.dtype)).to(output.dtype))
        return output


class _EmbeddingWithLeaves(_WithLeaves):
    """``nn.Embedding`` whose trained rows are looked up in the leaf, without a dense sum."""

    padding_idx: int | None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [...] → [..., embedding]."""
        kind, dim = self.leaf_parts["weight"]
        if kind != "rows" or dim != 0:
            return super().forward(tokens)
        leaf, rows = self.leaf("weight")
        place = torch.searchsorted(rows, tokens.contiguous()).clamp(max=len(rows) - 1)
        hit = (rows[place] == tokens).unsqueeze(-1)
        looked_up = F.embedding(place, leaf)
        if self.padding_idx is not None:
            # The row of the padding gets no gradient from nn.Embedding, nor does its leaf.
            padding = tokens.eq(self.padding_idx).unsqueeze(-1)
            looked_up = torch.where(padding, looked_up.detach(), looked_up)
        output = nn.Embedding.forward(self, tokens)  # type: ignore[arg-type]
        return output + torch.where(hit, looked_up, 0.0).to(output.dtype)


@cache
def _class_with_leaves(cls: type[nn.Module]) -> type[nn.Module]:
    fast = {nn.Linear: _LinearWithLeaves, Conv1D: _LinearWithLeaves, nn.Embedding: _EmbeddingWithLeaves}
    # Only the classes themselves: a subclass may compute something else from the same weight.
    # Named as the class itself: transformers writes the name of a model's class into its config.
    return type(cls.__name__, (fast.get(cls, _WithLeaves), cls), {})


class _ElementsLinear(torch.autograd.Function):
    """x (W + S)ᵀ + b, S zero but for the leaf at flat ``indices`` of W.

    Saves the parameter W and not the sum: under ZeRO-3 the backward hook has gathered W again, and elsewhere the sum
    would be a second copy of every trained matrix for the length of a step. The leaf's gradient is gathered from that
    of the rows and columns that hold its elements, or from the transient dense one where they hold most of W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        indices: Tensor,
        block: _Block | None,
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
            # Of W [first, second], as it is stored.
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


class _Effective(torch.autograd.Function):
    """What a dense part adds to its parameter; saves the leaves alone, for the same reason as ``_ElementsLinear``."""

    @staticmethod
    def forward(ctx: Any, part: DensePart, training: bool, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        ctx.part, ctx.training = part, training
        return part.effective(leaves, training).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        effective, leaves = _effective_again(ctx.part, ctx.saved_tensors, ctx.training)
        return None, None, *torch.autograd.grad(effective, leaves, grad.to(effective.dtype))


class _DenseLinear(torch.autograd.Function):
    """x (W + E)ᵀ + b, E what the rule makes of the leaves; saves the parameters and neither E nor the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: DensePart,
        training: bool,
        transposed: bool,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *leaves)
        ctx.part, ctx.training, ctx.transposed = part, training, transposed
        total = weight + part.effective(leaves, training).to(weight.dtype)
        return F.linear(x, total.t() if transposed else total, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *leaves = ctx.saved_tensors
        effective, leaves = _effective_again(ctx.part, leaves, ctx.training)
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


def _effective_again(part: DensePart, leaves: Sequence[Tensor], training: bool) -> tuple[Tensor, list[Tensor]]:
    """What ``part`` added in the forward pass, and the leaves that it then depends on. The step being the same, so are
    the draws.
    """
    with torch.enable_grad():
        again = [leaf.detach().requires_grad_() for leaf in leaves]
        return part.effective(again, training), again
