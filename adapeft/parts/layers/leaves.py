"""Modules with leaves: a leaf is the trained difference of a parameter, or of some of its rows or elements.

The module's class is replaced by a subclass, so that the module keeps its parameters, name and hooks: under ZeRO-3 its
pre-forward hook gathers weight and leaf together, which would not work with a wrapper around another module's weight.
A leaf starts at zero; optimizer, gradients and checkpoints contain only the leaf, and weight decay on it pulls towards
the pretrained value.

Reading such a parameter as an attribute, in the module's forward or anywhere else, returns the sum of parameter and
leaf. Code that works on parameters as such (``named_parameters``, ``state_dict``, ``get_parameter``, optimizers, ZeRO,
FSDP) finds them in ``_parameters`` and gets the parameter alone.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapeft.errors import AdapeftError
from adapeft.model.quantized import is_quantized_layer
from adapeft.parts.part import PartAndValues
from adapeft.parts.rule import DIFFERENCE

_CHANGE_FIRST = (
    "Tie, prune, normalize (weight_norm, spectral_norm) and parametrize the model before adapeft.attach, or after "
    "adapeft.detach."
)


class Held(NamedTuple):
    """Leaves and buffers of one part in a module.

    Attributes:
        leaves: leaves in the order of ``LeafPart.leaf_names``.
        buffers: buffers of ``LeafPart.buffers``.
    """

    leaves: tuple[Tensor, ...]
    buffers: dict[str, Tensor]


class LeafPart(ABC):
    """Interface of the parts that modules with leaves use.

    Attributes:
        leaf_names: names of the part's leaves.
    """

    leaf_names: tuple[str, ...]

    @abstractmethod
    def buffers(self, is_linear: bool) -> dict[str, Tensor]:
        """Return the tensors that the module needs next to the leaves and registers as buffers, such as indices.

        Args:
            is_linear: whether the module calls ``linear``.
        """

    @abstractmethod
    def added_to(self, parameter: Tensor, held: Held, training: bool) -> Tensor:
        """Return the dense sum of the parameter and the difference that the leaves define."""

    @abstractmethod
    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, held: Held, training: bool, transposed: bool
    ) -> Tensor:
        """Apply a linear layer whose weight has the part: x [..., in] → [..., out]; ``transposed`` for ``Conv1D``."""

    def added_to_output(self, output: Tensor, x: Tensor, shape: tuple[int, int], held: Held, training: bool) -> Tensor:
        """Return the output [..., out] of a linear layer for x [..., in] plus what the difference adds to it.

        Args:
            shape: shape (out, in) of the weight, which is not read.
        """
        nothing = x.new_zeros(()).expand(shape)
        return output + self.linear(x, nothing, None, held, training, transposed=False).to(output.dtype)

    @property
    def looks_up(self) -> bool:
        """Whether ``look_up`` is implemented, for embeddings."""
        return False

    def look_up(self, tokens: Tensor, weight: Tensor, held: Held, padding_idx: int | None) -> Tensor:
        """Look up embeddings without a dense sum: tokens int64 [...] → [..., embedding]."""
        raise NotImplementedError

    @abstractmethod
    def merged(self, leaves: Sequence[Tensor]) -> PartAndValues:
        """Return the difference that ``leaves`` add in evaluation mode, as a part and its values."""


def add_leaves(module: nn.Module, name: str, part: LeafPart, leaves: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Register in ``module`` the ``leaves`` of ``part``, which trains the module's parameter ``name``.

    Returns:
        Leaf → its name in ``module``.
    """
    with_leaves = _with_leaves(module)
    parameter = module.get_parameter(name)
    for leaf, value in leaves.items():
        module.register_parameter(_leaf_name(name, leaf), value)
    is_linear = isinstance(with_leaves, _LinearWithLeaves | _QuantizedWithLeaves)
    for buffer, tensor in part.buffers(is_linear).items():
        module.register_buffer(f"{name}_leaf_{buffer}", tensor.to(parameter.device), persistent=False)
    with_leaves.leaf_parts[name] = part
    return {leaf: _leaf_name(name, leaf) for leaf in leaves}


def remove_leaves(module: nn.Module) -> None:
    """Remove all leaves from ``module`` and restore its class."""
    if isinstance(module, _WithLeaves):
        for name, part in module.leaf_parts.items():
            for leaf in part.leaf_names:
                delattr(module, _leaf_name(name, leaf))
            for buffer in module.buffer_names(name):
                delattr(module, buffer)
        del module.__dict__["leaf_parts"], module.__dict__["leaves_are_off"]
        module.__class__ = type(module).__bases__[1]


def switch_leaves(module: nn.Module, on: bool) -> None:
    """Make ``module`` compute with its leaves, or without them as its own class does."""
    if isinstance(module, _WithLeaves):
        module.__dict__["leaves_are_off"] = not on


def leaves_of(module: nn.Module) -> dict[str, dict[str, str]]:
    """Return, for each parameter of ``module`` that has leaves, a mapping from leaf to its name in ``module``."""
    if not isinstance(module, _WithLeaves):
        return {}
    return {
        name: {leaf: _leaf_name(name, leaf) for leaf in part.leaf_names} for name, part in module.leaf_parts.items()
    }


def difference_of(module: nn.Module, name: str, leaves: Sequence[Tensor]) -> PartAndValues:
    """Return the difference that ``leaves`` add to a parameter in evaluation mode, as a part and its values.

    Args:
        module: module with leaves.
        name: name of the parameter in the module.
        leaves: leaves of the parameter in the order of ``leaves_of``.
    """
    assert isinstance(module, _WithLeaves)
    return module.leaf_parts[name].merged(leaves)


def _with_leaves(module: nn.Module) -> _WithLeaves:
    if not isinstance(module, _WithLeaves):
        module.__class__ = _class_with_leaves(type(module))  # type: ignore[arg-type]
        module.__dict__.update(leaf_parts={}, leaves_are_off=False)
    assert isinstance(module, _WithLeaves)
    return module


def _leaf_name(name: str, leaf: str = DIFFERENCE) -> str:
    return f"{name}_leaf" if leaf == DIFFERENCE else f"{name}_leaf_{leaf}"


class _WithLeaves(nn.Module):
    """Mixin for any module: reading a parameter that has leaves returns the sum.

    This is correct for any use of the parameters, by the module or by others that read them. The sum is a dense
    transient, built once per forward of the module and once per read from elsewhere.
    """

    leaf_parts: dict[str, LeafPart]
    leaves_are_off: bool

    def __getattr__(self, name: str) -> Any:
        # Python calls this for names that are neither in the instance nor in its class, so for every parameter.
        # While FSDP replaces a parameter, it is briefly missing.
        with_leaves = name in self.__dict__.get("leaf_parts", ()) and name in self.__dict__["_parameters"]
        if with_leaves and not self.__dict__["leaves_are_off"] and not _is_asked_for_the_parameter():
            return self.summed(name)
        return super().__getattr__(name)

    # No __setattr__: FSDP2 writes to _parameters only if a module has nn.Module's.
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register as in ``nn.Module``, but refuse plain tensors: pruning passes the sum that it has read."""
        if isinstance(param, Tensor) and not isinstance(param, nn.Parameter):
            trained = ", ".join(map(repr, self.leaf_parts))
            raise AdapeftError(
                f"the parameter {name!r} of a {type(self).__name__} cannot be set to a tensor that is not a parameter. "
                f"A subset trains {trained} there, so reading it returns the sum of base and trained difference. "
                f"{_CHANGE_FIRST}"
            )
        super().register_parameter(name, param)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class created at run time cannot be imported: copies and pickles recreate it from the module's own class.
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__bases__[1],), *reduced[2:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward of the module's own class with the sums as its parameters."""
        if self.leaves_are_off:
            return super().forward(*args, **kwargs)
        sums = {name: self.summed(name) for name in self.leaf_parts}
        # Instance attributes take precedence over nn.Module's parameters, which ZeRO's hooks still see.
        self.__dict__.update(sums)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for name in sums:
                self.__dict__.pop(name, None)  # a nested forward may have removed them already

    def extra_repr(self) -> str:
        """Describe the module as its own class does, which may ask whether it has a bias: without computing sums.

        DeepSpeed prints the model while it sets up an engine, when parameters are divided and cannot be summed.
        """
        were_off, self.leaves_are_off = self.leaves_are_off, True
        try:
            return super().extra_repr()
        finally:
            self.leaves_are_off = were_off

    def held(self, name: str) -> Held:
        """Return the leaves and buffers of the part of parameter ``name``."""
        leaves = tuple(self._parameters[_leaf_name(name, leaf)] for leaf in self.leaf_parts[name].leaf_names)
        start = len(f"{name}_leaf_")
        return Held(leaves, {key[start:]: self._buffers[key] for key in self.buffer_names(name)})  # type: ignore[arg-type, misc]

    def buffer_names(self, name: str) -> list[str]:
        """Return the names of the buffers of the part of parameter ``name``."""
        return [key for key in self._buffers if key.startswith(f"{name}_leaf_")]

    def summed(self, name: str) -> Tensor:
        """Return the dense sum of parameter and leaves."""
        # ZeRO-3 gathers parameters that are read with [], not with get.
        parameter = self._parameters[name] if name in self._parameters else None  # noqa: SIM401
        if parameter is None:
            raise AdapeftError(
                f"the parameter {name!r} of a {type(self).__name__} is trained by a subset, but was removed from the "
                f"module after adapeft.attach. {_CHANGE_FIRST}"
            )
        if name not in self.leaf_parts:
            return parameter
        return self.leaf_parts[name].added_to(parameter, self.held(name), self.training)


class _LinearWithLeaves(_WithLeaves):
    """``nn.Linear`` and ``Conv1D``, computed by the part of their weight without saving a dense sum."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [..., in] → [..., out]."""
        if self.leaves_are_off:
            return super(_WithLeaves, self).forward(x)
        if self._parameters.get("weight") is None:  # computed from other parameters, as in weight normalization
            return super().forward(x)
        transposed = isinstance(self, Conv1D)
        bias = self.summed("bias") if self._parameters.get("bias") is not None else None
        weight = self._parameters["weight"]
        assert weight is not None
        if "weight" not in self.leaf_parts:
            return F.linear(x, weight.t() if transposed else weight, bias)
        return self.leaf_parts["weight"].linear(x, weight, bias, self.held("weight"), self.training, transposed)


class _QuantizedWithLeaves(_WithLeaves):
    """A linear layer with a quantized weight: what the differences add is added to the output of its own forward.

    Reading its weight returns the codes, to which nothing can be added.
    """

    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [..., in] → [..., out]."""
        if self.leaves_are_off:
            return super(_WithLeaves, self).forward(x)
        own = {name: self._parameters[name] for name in self.leaf_parts}
        self.__dict__.update(own)
        try:
            output: Tensor = super(_WithLeaves, self).forward(x)
        finally:
            for name in own:
                del self.__dict__[name]
        if part := self.leaf_parts.get("weight"):
            shape = (self.out_features, self.in_features)
            output = part.added_to_output(output, x, shape, self.held("weight"), self.training)
        if part := self.leaf_parts.get("bias"):
            nothing = output.new_zeros(self.out_features)
            output = output + part.added_to(nothing, self.held("bias"), self.training)
        return output

    def summed(self, name: str) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight if name == "weight" else super().summed(name)


class _EmbeddingWithLeaves(_WithLeaves):
    """``nn.Embedding`` whose trained rows are looked up in the leaf, without a dense sum."""

    padding_idx: int | None
    max_norm: float | None
    scale_grad_by_freq: bool
    sparse: bool

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up embeddings: tokens int64 [...] → [..., embedding]."""
        if self.leaves_are_off:
            return super(_WithLeaves, self).forward(tokens)
        part = self.leaf_parts.get("weight")
        if part is None or not part.looks_up or self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return super().forward(tokens)
        weight = self._parameters["weight"]
        assert weight is not None
        return part.look_up(tokens, weight, self.held("weight"), self.padding_idx)


class _RecurrentWithLeaves(_WithLeaves):
    """``nn.LSTM`` and the other ``nn.RNNBase``, which also keep their parameters in a list and compute with that."""

    _flat_weights: list[Tensor]
    _flat_weights_names: list[str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward of the module's own class with the sums in its list of weights."""
        if self.leaves_are_off:
            return super(_WithLeaves, self).forward(*args, **kwargs)
        parameters = self._flat_weights
        self.__dict__["_flat_weights"] = [self.summed(name) for name in self._flat_weights_names]
        try:
            return super(_WithLeaves, self).forward(*args, **kwargs)
        finally:
            self.__dict__["_flat_weights"] = parameters

    def _weights_have_changed(self) -> bool:
        # The sums are new tensors in every forward; torch would flatten and keep them as if they were new parameters.
        return False


@cache
def _class_with_leaves(cls: type[nn.Module]) -> type[nn.Module]:
    fast = {nn.Linear: _LinearWithLeaves, Conv1D: _LinearWithLeaves, nn.Embedding: _EmbeddingWithLeaves}
    # Only these exact classes: a subclass may use the weight in another way.
    general: type[_WithLeaves] = _RecurrentWithLeaves if issubclass(cls, nn.RNNBase) else _WithLeaves
    if is_quantized_layer(cls):
        general = _QuantizedWithLeaves
    # Same name as the original class: transformers writes the name of a model's class to its config.
    return type(cls.__name__, (fast.get(cls, general), cls), {})


def _blank(cls: type[nn.Module]) -> nn.Module:
    """Return an empty instance of the class with leaves of ``cls``, to be filled by copying or unpickling."""
    with_leaves = _class_with_leaves(cls)  # type: ignore[arg-type]
    return with_leaves.__new__(with_leaves)


def _is_asked_for_the_parameter() -> bool:
    """Whether the code that reads the attribute needs the parameter itself, to write to it, tie it or shard it.

    ``nn.Module.get_parameter`` and FSDP read parameters of other modules as ordinary attributes.
    """
    if torch.compiler.is_compiling():
        return False
    reader = sys._getframe(2)
    is_fsdp = str(reader.f_globals.get("__name__")).startswith("torch.distributed.")
    return is_fsdp or reader.f_code is nn.Module.get_parameter.__code__
