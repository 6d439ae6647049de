"""A change: what a delta does to one parameter, and how it is undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapeft.choose.subset import BESIDE, Part, check_part, compact_indices
from adapeft.errors import AdapeftError
from adapeft.tune.adapter import install_adapter, remove_adapter
from adapeft.tune.leaves import leaf_shape


class Change(ABC):
    """What is different at the parameter that ``part`` is of."""

    part: Part

    @property
    @abstractmethod
    def count(self) -> int:
        """Trained elements."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, by suffixes of the parameter's name."""

    @abstractmethod
    def make(self, model: nn.Module, name: str) -> Any:
        """Changes parameter ``name`` of ``model`` in place; returns what ``undo`` needs."""

    @abstractmethod
    def undo(self, model: nn.Module, name: str, before: Any) -> None:
        """Makes the model what it was, bit for bit."""

    def fold_into(self, name: str, weight: Tensor) -> None:
        """Adds the change to a plain weight in place.

        Raises:
            AdapeftError: a weight cannot hold it.
        """
        raise AdapeftError(
            f"the delta has {self.part.kind} beside {name!r}, which no plain checkpoint can hold. Apply the delta in "
            f"Python instead: adapeft.Delta.load(…).apply(model)."
        )

    @staticmethod
    def from_tensors(path: Path, name: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Change:
        """The change that ``tensors`` (by suffix) hold.

        Raises:
            AdapeftError: they do not fit the header.
            KeyError: a tensor is missing.
        """
        part = Part.from_header(header, tensors.get("indices"))
        check_part(path, name, part)
        if part.kind not in BESIDE:
            expected = {"values": part.shape if part.indices is None else leaf_shape(part)}
        else:
            expected = part.factor_shapes
        for suffix, shape in expected.items():
            if tuple(tensors[suffix].shape) != tuple(shape):
                raise AdapeftError(
                    f"{path}: {name!r} has {suffix} of shape {tuple(tensors[suffix].shape)}, not {tuple(shape)}."
                )
        if part.kind not in BESIDE:
            return Difference(part, tensors["values"])
        leaves = {suffix: tensors[suffix] for suffix in expected}
        return LowRank(part, leaves) if part.kind == "lora" else Bottleneck(part, leaves)


class Addition(Change):
    """A change that adds to the parameter's values."""

    @torch.no_grad()
    def make(self, model: nn.Module, name: str) -> Tensor:
        parameter = model.get_parameter(name)
        before = self.touched(parameter)
        self.fold_into(name, parameter)
        return before

    @torch.no_grad()
    def undo(self, model: nn.Module, name: str, before: Tensor) -> None:
        self.put_back(model.get_parameter(name), before)

    def touched(self, parameter: Tensor) -> Tensor:
        """A copy of the entries of ``parameter`` that change."""
        return parameter.detach().clone()

    def put_back(self, parameter: Tensor, entries: Tensor) -> None:
        """Writes what ``touched`` returned."""
        parameter.copy_(entries)


@dataclass(frozen=True)
class Difference(Addition):
    """``values`` float32, shaped like the leaf of ``part``, or like a whole tensor."""

    part: Part
    values: Tensor

    @property
    def count(self) -> int:
        return self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        if self.part.indices is None:
            return {"values": self.values}
        return {"values": self.values, "indices": compact_indices(self.part.indices, self.part.shape)}

    @torch.no_grad()
    def fold_into(self, name: str, weight: Tensor) -> None:
        """Adds the difference in float32, rounded once to the weight's dtype."""
        indices, values = self.part.indices, self.values.to(weight.device)
        if indices is None:
            weight.copy_(weight.float() + values)
        else:
            place = indices.to(weight.device)
            view, dim = (weight.view(-1), 0) if self.part.kind == "elements" else (weight, self.part.dim)
            trained = view.index_select(dim, place).float() + values.movedim(0, dim)
            view.index_copy_(dim, place, trained.to(view.dtype))

    def touched(self, parameter: Tensor) -> Tensor:
        if self.part.indices is None:
            return super().touched(parameter)
        place = self.part.indices.to(parameter.device)
        if self.part.kind == "elements":
            return parameter.detach().view(-1)[place]
        return parameter.detach().index_select(self.part.dim, place)

    def put_back(self, parameter: Tensor, entries: Tensor) -> None:
        if self.part.indices is None:
            super().put_back(parameter, entries)
            return
        view, dim = (parameter.view(-1), 0) if self.part.kind == "elements" else (parameter, self.part.dim)
        view.index_copy_(dim, self.part.indices.to(parameter.device), entries)


@dataclass(frozen=True)
class LowRank(Addition):
    """LoRA: alpha / rank · B·A, added to the weight; ``leaves`` lora_A [rank, in] and lora_B [out, rank]."""

    part: Part
    leaves: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        return self.part.count

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.leaves)

    @torch.no_grad()
    def fold_into(self, name: str, weight: Tensor) -> None:
        """Adds the product in float32, rounded once to the weight's dtype."""
        down, up = (self.leaves[leaf].to(weight.device) for leaf in ("lora_A", "lora_B"))
        product = self.part.alpha / self.part.rank * (up @ down)
        weight.copy_(weight.float() + (product if self.part.dim == 0 else product.t()))


@dataclass(frozen=True)
class Bottleneck(Change):
    """An adapter after the layer whose weight the parameter is; ``leaves`` as in ``Part.factor_shapes``."""

    part: Part
    leaves: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        return self.part.count

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.leaves)

    def make(self, model: nn.Module, name: str) -> None:
        layer = model.get_submodule(name.removesuffix(".weight"))
        device = model.get_parameter(name).device
        install_adapter(
            layer, {leaf: nn.Parameter(value.to(device), requires_grad=False) for leaf, value in self.leaves.items()}
        )

    def undo(self, model: nn.Module, name: str, before: None) -> None:
        remove_adapter(model.get_submodule(name.removesuffix(".weight")))
