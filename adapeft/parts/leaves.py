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
from adapeft.parts.part import PartAndValues
from adapeft.parts.rule import DIFFERENCE

_CHANGE_FIRST = (
    "Tie, prune, normalize (weight_norm, spectral_norm) and parametrize the model before adapeft.attach, or after "
    "adapeft.detach."
)


class Held(NamedTuple):
    """What a module holds of a part of its own parameter.

    Attributes:
        leaves: in the order of ``LeafPart.leaf_names``.
        indices: the buffers of ``LeafPart.index_buffers``.
    """

    leaves: tuple[Tensor, ...]
    indices: dict[str, Tensor]


class LeafPart(ABC):
    """What modules with leaves ask of a part that they hold.

    Attributes:
        leaf_names: names of its leaves.
    """

    leaf_names: tuple[str, ...]

    @abstractmethod
    def index_buffers(self, is_linear: bool) -> dict[str, Tensor]:
        """int64: what the module needs beside the leaves, which its buffers keep on its device.

        Args:
            is_linear: whether the module computes with ``linear``.
        """

    @abstractmethod
    def added_to(self, parameter: Tensor, held: Held, training: bool) -> Tensor:
        """Parameter plus what the leaves make of it, dense."""

    @abstractmethod
    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, held: Held, training: bool, transposed: bool
    ) -> Tensor:
        """x [..., in] → [..., out] of a linear layer whose weight has the part; ``transposed`` for ``Conv1D``."""

    @property
    def looks_up(self) -> bool:
        """Whether ``look_up`` serves an embedding."""
        return False

    def look_up(self, tokens: Tensor, weight: Tensor, held: Held, padding_idx: int | None) -> Tensor:
        """tokens int64 [...] → [..., embedding] without a dense sum."""
        raise NotImplementedError

    @abstractmethod
    def merged(self, leaves: Sequence[Tensor]) -> PartAndValues:
        """What ``leaves`` add to the parameter when it does not train, as a part and its values."""


def add_leaves(module: nn.Module, name: str, part: LeafPart, leaves: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Gives ``module`` the ``leaves`` of ``part``, which trains the module's parameter ``name``.

    Returns:
        Leaf → its name in ``module``.
    """
    with_leaves = _with_leaves(module)
    parameter = module.get_parameter(name)
    for leaf, value in leaves.items():
        module.register_parameter(_leaf_name(name, leaf), value)
    for buffer, index in part.index_buffers(isinstance(with_leaves, _LinearWithLeaves)).items():
        module.register_buffer(f"{name}_leaf_{buffer}", index.to(parameter.device), persistent=False)
    with_leaves.leaf_parts[name] = part
    return {leaf: _leaf_name(name, leaf) for leaf in leaves}


def remove_leaves(module: nn.Module) -> None:
    """Gives ``module`` its own class back."""
    if isinstance(module, _WithLeaves):
        for name, part in module.leaf_parts.items():
            for leaf in part.leaf_names:
                delattr(module, _leaf_name(name, leaf))
            for buffer in module.index_names(name):
                delattr(module, buffer)
        del module.__dict__["leaf_parts"]
        module.__class__ = type(module).__bases__[1]


def leaves_of(module: nn.Module) -> dict[str, dict[str, str]]:
    """Name of each parameter of ``module`` that has leaves → these → their names in ``module``."""
    if not isinstance(module, _WithLeaves):
        return {}
    return {
        name: {leaf: _leaf_name(name, leaf) for leaf in part.leaf_names} for name, part in module.leaf_parts.items()
    }


def difference_of(module: nn.Module, name: str, leaves: Sequence[Tensor]) -> PartAndValues:
    """What ``leaves`` add to the parameter ``name`` of ``module`` when it does not train, as a part and its values.

    Args:
        module: one with leaves.
        name: of the parameter.
        leaves: its leaves in the order of ``leaves_of``.
    """
    assert isinstance(module, _WithLeaves)
    return module.leaf_parts[name].merged(leaves)


def _with_leaves(module: nn.Module) -> _WithLeaves:
    if not isinstance(module, _WithLeaves):
        module.__class__ = _class_with_leaves(type(module))  # type: ignore[arg-type]
        module.__dict__.update(leaf_parts={})
    assert isinstance(module, _WithLeaves)
    return module


def _leaf_name(name: str, leaf: str = DIFFERENCE) -> str:
    return f"{name}_leaf" if leaf == DIFFERENCE else f"{name}_leaf_{leaf}"


class _WithLeaves(nn.Module):
    """Any module: its parameters that have leaves read as their sums.

    Correct for whatever the module, or another one that reads its parameters, does with them; a sum is a dense
    transient, built once for the module's own forward and once for every read from elsewhere.
    """

    leaf_parts: dict[str, LeafPart]

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

    def held(self, name: str) -> Held:
        """The leaves and indices of the part of parameter ``name``."""
        leaves = tuple(self._parameters[_leaf_name(name, leaf)] for leaf in self.leaf_parts[name].leaf_names)
        start = len(f"{name}_leaf_")
        return Held(leaves, {key[start:]: self._buffers[key] for key in self.index_names(name)})  # type: ignore[arg-type, misc]

    def index_names(self, name: str) -> list[str]:
        """The buffers that hold indices of the part of parameter ``name``."""
        return [key for key in self._buffers if key.startswith(f"{name}_leaf_indices")]

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
        return self.leaf_parts[name].added_to(parameter, self.held(name), self.training)


class _LinearWithLeaves(_WithLeaves):
    """``nn.Linear`` and ``Conv1D`` as the part of their weight computes them, without a saved dense sum."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        if self._parameters.get("weight") is None:  # computed from other parameters, as by weight normalization
            return super().forward(x)
        transposed = isinstance(self, Conv1D)
        bias = self.summed("bias") if self._parameters.get("bias") is not None else None
        weight = self._parameters["weight"]
        assert weight is not None
        if "weight" not in self.leaf_parts:
            return F.linear(x, weight.t() if transposed else weight, bias)
        return self.leaf_parts["weight"].linear(x, weight, bias, self.held("weight"), self.training, transposed)


class _EmbeddingWithLeaves(_WithLeaves):
    """``nn.Embedding`` whose trained rows are looked up in the leaf, without a dense sum."""

    padding_idx: int | None
    max_norm: float | None
    scale_grad_by_freq: bool
    sparse: bool

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [...] → [..., embedding]."""
        part = self.leaf_parts.get("weight")
        if part is None or not part.looks_up or self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return super().forward(tokens)
        weight = self._parameters["weight"]
        assert weight is not None
        return part.look_up(tokens, weight, self.held("weight"), self.padding_idx)


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
