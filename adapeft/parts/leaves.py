"""Modules that own a leaf: the trained difference of one of their own parameters, or of some rows or elements of it.

A module is turned into a subclass of its own class, so that it keeps its parameters, its name and its hooks: under
ZeRO-3 the module's pre-forward hook gathers weight and leaf together, which a wrapper around another module's weight
would not get. A leaf starts at zero and is all that the optimizer, the gradients and the checkpoints see; weight decay
on it pulls towards the pretrained value.

Whoever reads such a parameter as an attribute, within the module's forward or anywhere else, gets the sum of parameter
and leaf. What works on parameters as such (``named_parameters``, ``state_dict``, ``get_parameter``, optimizers, ZeRO,
FSDP) finds them in ``_parameters`` and gets the parameter alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapeft.errors import AdapeftError
from adapeft.parts.functions import Block, DenseLinear, DensePart, Effective, ElementsLinear
from adapeft.parts.part import Part
from adapeft.parts.rule import DIFFERENCE

_CHANGE_FIRST = (
    "Tie, prune, normalize (weight_norm, spectral_norm) and parametrize the model before adapeft.attach, or after "
    "adapeft.detach."
)
_SMALLER = 4
"""Times that a block is smaller than its matrix for its gradient to be worth the copies of its rows and columns."""


def add_leaf(module: nn.Module, name: str, part: Part, leaf: nn.Parameter) -> str:
    """Makes ``leaf`` part of ``module`` as the difference to its parameter ``name`` that ``part`` describes.

    Returns:
        The leaf's name in ``module``.
    """
    assert part.indices is not None
    with_leaves = _with_leaves(module)
    parameter = module.get_parameter(name)
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
    """Any module: its parameters that have leaves read as their sums.

    Correct for whatever the module, or another one that reads its parameters, does with them; a sum is a dense
    transient, built once for the module's own forward and once for every read from elsewhere.
    """

    leaf_parts: dict[str, tuple[str, int]]
    dense_parts: dict[str, DensePart]

    def __getattr__(self, name: str) -> Any:
        # Python asks here for what is in neither the instance nor its class, so for every parameter.
        # A parameter that FSDP has taken out to put another in its place is not there for a moment.
        with_leaves = name in self.__dict__.get("leaf_parts", ()) and name in self.__dict__["_parameters"]
        if with_leaves and not _is_asked_for_the_parameter():
            return self.summed(name)
        return super().__getattr__(name)

    # No __setattr__: FSDP2 writes into _parameters only where a module has nn.Module's own.
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module``'s, which pruning gives what it has read: the sum, and no parameter."""
        if isinstance(param, Tensor) and not isinstance(param, nn.Parameter):
            trained = ", ".join(map(repr, self.leaf_parts))
            raise AdapeftError(
                f"the parameter {name!r} of a {type(self).__name__} cannot be set to a tensor that is no parameter. A "
                f"subset trains {trained} there: what is read is the sum of the base and its training. {_CHANGE_FIRST}"
            )
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made at run time cannot be imported: copies and pickles make it anew from the module's own class.
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__bases__[1],), *reduced[2:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's own class on the sums."""
        sums = {name: self.summed(name) for name in self.leaf_parts}
        # An instance attribute is found before nn.Module's own parameters, which ZeRO's hooks keep seeing.
        self.__dict__.update(sums)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in sums:
                self.__dict__.pop(name, None)  # a forward within this one has taken them away already

    def leaf(self, name: str) -> tuple[Tensor, Tensor]:
        """The leaf of parameter ``name`` and its indices."""
        return self._parameters[_leaf_name(name)], self._buffers[_indices_name(name)]  # type: ignore[return-value]

    def block(self, name: str) -> Block | None:
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
        # ZeRO-3 gathers what is read with [], not with get.
        parameter = self._parameters[name] if name in self._parameters else None  # noqa: SIM401
        if parameter is None:
            raise AdapeftError(
                f"the parameter {name!r} of a {type(self).__name__} is trained by a subset and was taken out of it "
                f"after adapeft.attach. {_CHANGE_FIRST}"
            )
        if name not in self.leaf_parts:
            return parameter
        kind, dim = self.leaf_parts[name]
        if kind == "dense":
            effective = Effective.apply(self.dense_parts[name], self.training, *self.dense_leaves(name))
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
        if self._parameters.get("weight") is None:  # computed from other parameters, as by weight normalization
            return super().forward(x)
        transposed = isinstance(self, Conv1D)
        bias = self.summed("bias") if self._parameters.get("bias") is not None else None
        weight = self._parameters["weight"]
        assert weight is not None
        kind, dim = self.leaf_parts.get("weight", ("", 0))
        if kind == "elements":
            return ElementsLinear.apply(x, weight, bias, *self.leaf("weight"), self.block("weight"), transposed)
        if kind == "dense":
            part, leaves = self.dense_parts["weight"], self.dense_leaves("weight")
            return DenseLinear.apply(x, weight, bias, part, self.training, transposed, *leaves)
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
    max_norm: float | None
    scale_grad_by_freq: bool
    sparse: bool

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [...] → [..., embedding]."""
        kind, dim = self.leaf_parts.get("weight", ("", 0))
        if kind != "rows" or dim != 0 or self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return super().forward(tokens)
        leaf, rows = self.leaf("weight")
        place = torch.searchsorted(rows, tokens.contiguous()).clamp(max=len(rows) - 1)
        hit = (rows[place] == tokens).unsqueeze(-1)
        looked_up = F.embedding(place, leaf)
        if self.padding_idx is not None:
            # The row of the padding gets no gradient from nn.Embedding, nor does its leaf.
            padding = tokens.eq(self.padding_idx).unsqueeze(-1)
            looked_up = torch.where(padding, looked_up.detach(), looked_up)
        weight = self._parameters["weight"]
        assert weight is not None
        output = F.embedding(tokens, weight, self.padding_idx)
        return output + torch.where(hit, looked_up, 0.0).to(output.dtype)


class _RecurrentWithLeaves(_WithLeaves):
    """``nn.LSTM`` and its like, which keep their parameters in a list besides and compute with that."""

    _flat_weights: list[Tensor]
    _flat_weights_names: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's own class on a list of the sums."""
        parameters = self._flat_weights
        self.__dict__["_flat_weights"] = [self.summed(name) for name in self._flat_weights_names]
        try:
            return super(_WithLeaves, self).forward(*args, **kwargs)
        finally:
            self.__dict__["_flat_weights"] = parameters

    def _weights_have_changed(self) -> bool:
        # The sums of every forward are new, which torch would take for new parameters to lay out anew and keep.
        return False


@cache
def _class_with_leaves(cls: type[nn.Module]) -> type[nn.Module]:
    fast = {nn.Linear: _LinearWithLeaves, Conv1D: _LinearWithLeaves, nn.Embedding: _EmbeddingWithLeaves}
    # Only the classes themselves: a subclass may compute something else from the same weight.
    general = _RecurrentWithLeaves if issubclass(cls, nn.RNNBase) else _WithLeaves
    # Named as the class itself: transformers writes the name of a model's class into its config.
    return type(cls.__name__, (fast.get(cls, general), cls), {})


def _blank(cls: type[nn.Module]) -> nn.Module:
    """An instance of the class with leaves of ``cls``, to be filled by whoever copies or unpickles one."""
    with_leaves = _class_with_leaves(cls)  # type: ignore[arg-type]
    return with_leaves.__new__(with_leaves)


def _is_asked_for_the_parameter() -> bool:
    """Whether who reads the attribute wants the parameter itself: to write to it or to tie it, or to divide it.

    ``nn.Module.get_parameter`` and FSDP read an attribute like anyone else, of modules that they do not own.
    """
    if torch.compiler.is_compiling():
        return False
    reader = sys._getframe(2)
    is_fsdp = str(reader.f_globals.get("__name__")).startswith("torch.distributed.")
    return is_fsdp or reader.f_code is nn.Module.get_parameter.__code__
