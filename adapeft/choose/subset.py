"""A subset: which parameters are trained. Saved as safetensors; a whole tensor needs no more than its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from adapeft.artifact import load_tensors, save_tensors
from adapeft.errors import AdapeftError, did_you_mean

Kind = Literal["tensor", "rows", "elements", "dense", "lora", "adapter"]
BESIDE: tuple[Kind, ...] = ("lora", "adapter")
"""Kinds that train weights beside a frozen matrix, and are p-sparse with respect to the model that has them."""


@dataclass(frozen=True)
class Part:
    """What is trained of one parameter.

    Attributes:
        kind: the whole ``tensor``, ``rows`` of a matrix, single ``elements``, or ``dense``: every element's difference
            to the base, under the rule that ``Subset.description`` names. Beside the weight of a linear layer:
            ``lora``, a product of two matrices added to it, or ``adapter``, a bottleneck after it.
        shape: of the parameter.
        indices: int64, ascending; rows along ``dim``, or positions in the flattened parameter; None for the
            whole parameter.
        dim: the dimension that rows, or output neurons, are counted along.
        rank: of LoRA's product, or the size of an adapter's bottleneck.
        alpha: LoRA's product is scaled by alpha / rank.
    """

    kind: Kind
    shape: tuple[int, ...]
    indices: Tensor | None = None
    dim: int = 0
    rank: int = 0
    alpha: float = 0.0

    @property
    def count(self) -> int:
        """Number of trained elements."""
        if self.kind in BESIDE:
            return sum(math.prod(shape) for shape in self.factor_shapes.values())
        total = int(torch.Size(self.shape).numel())
        if self.indices is None:
            return total
        return len(self.indices) * (total // self.shape[self.dim] if self.kind == "rows" else 1)

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the leaves of a part beside a matrix, by name; LoRA's names are peft's."""
        outputs, inputs = self.shape[self.dim], self.shape[1 - self.dim]
        if self.kind == "lora":
            return {"lora_A": (self.rank, inputs), "lora_B": (outputs, self.rank)}
        return {
            "adapter_down": (self.rank, outputs),
            "adapter_down_bias": (self.rank,),
            "adapter_up": (outputs, self.rank),
            "adapter_up_bias": (outputs,),
        }

    def described(self) -> dict[str, Any]:
        """What a file's header says of the part; its indices are a tensor of the file."""
        header = {"kind": self.kind, "shape": self.shape, "dim": self.dim}
        if self.kind in BESIDE:
            header |= {"rank": self.rank}
        return header | {"alpha": self.alpha} if self.kind == "lora" else header

    @classmethod
    def from_header(cls, header: Mapping[str, Any], indices: Tensor | None) -> Part:
        """The part that ``described`` told of, for ``check_part`` to judge."""
        indices = None if indices is None else indices.long()
        numbers = {name: header[name] for name in ("rank", "alpha") if name in header}
        return cls(header["kind"], tuple(header["shape"]), indices, header["dim"], **numbers)


@dataclass(frozen=True)
class Subset:
    """Parts by parameter name, and the parameters trained whatever was chosen.

    Attributes:
        parts: chosen within the budget.
        always_train: names of the parameters outside the budget, trained whole (a new head).
        new: those of them that no base checkpoint holds.
        description: how it was chosen: method, budget, value, bound, gap, fingerprint of the base model, config, seed.
    """

    parts: Mapping[str, Part]
    always_train: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Trained elements within the budget."""
        return sum(part.count for part in self.parts.values())

    def of_model(self, always_train: tuple[str, ...], new: tuple[str, ...]) -> Subset:
        """The same subset with the parameters outside the budget."""
        return replace(self, always_train=always_train, new=new)

    def described(self, **more: Any) -> Subset:
        """The same subset with more said of it."""
        return replace(self, description={**self.description, **more})

    def check_fits(self, model: nn.Module) -> None:
        """Checks names and shapes against ``model``.

        Raises:
            AdapeftError: a parameter is missing or has another shape.
        """
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
        for name in (*self.parts, *self.always_train):
            if name not in shapes:
                hint = did_you_mean(name, shapes)
                raise AdapeftError(f"the subset trains {name!r}, which this model does not have.{hint}")
        for name, part in self.parts.items():
            if part.shape != shapes[name]:
                raise AdapeftError(
                    f"the subset's {name!r} has shape {part.shape}, this model's {shapes[name]}: it was chosen for "
                    f"another model."
                )

    def save(self, path: str | Path) -> None:
        """Writes ``subset.safetensors``."""
        parts = {name: part.described() for name, part in self.parts.items()}
        indices = {name: compact_indices(p.indices, p.shape) for name, p in self.parts.items() if p.indices is not None}
        content = {"parts": parts, "always_train": self.always_train, "new": self.new, **self.description}
        save_tensors(Path(path), "subset", indices, content)

    @classmethod
    def load(cls, path: str | Path) -> Subset:
        """Reads ``subset.safetensors``.

        Raises:
            AdapeftError: not a subset, truncated, or its indices do not fit its shapes.
        """
        indices, content = load_tensors(Path(path), "subset")
        try:
            parts = {name: Part.from_header(header, indices.get(name)) for name, header in content.pop("parts").items()}
            for name, part in parts.items():
                check_part(path, name, part)
            return cls(parts, tuple(content.pop("always_train")), tuple(content.pop("new")), content)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise AdapeftError(f"{path}: damaged description of a subset ({error}). Choose again.") from error


def check_part(path: str | Path, name: str, part: Part) -> None:
    """Checks that a loaded part's indices lie in its shape, strictly ascending, and that its rank is possible.

    Raises:
        AdapeftError: they do not.
    """
    if part.kind not in get_args(Kind) or (part.kind in ("rows", "elements")) == (part.indices is None):
        raise AdapeftError(f"{path}: {name!r} is of kind {part.kind!r}, which does not go with its indices.")
    if part.kind in BESIDE:
        _check_rank(path, name, part)
    if part.indices is None:
        return
    limit = part.shape[part.dim] if part.kind == "rows" else int(torch.Size(part.shape).numel())
    ascending = bool((part.indices[1:] > part.indices[:-1]).all()) if part.indices.ndim == 1 else False
    if not ascending or (len(part.indices) and not 0 <= int(part.indices[0]) <= int(part.indices[-1]) < limit):
        raise AdapeftError(f"{path}: the indices of {name!r} are not ascending within 0 … {limit - 1}.")


def _check_rank(path: str | Path, name: str, part: Part) -> None:
    is_matrix = len(part.shape) == 2 and part.dim in (0, 1)
    is_possible = type(part.rank) is int and is_matrix and 1 <= part.rank <= min(part.shape)
    if not is_possible or (part.kind == "lora" and not (math.isfinite(part.alpha) and part.alpha > 0)):
        raise AdapeftError(
            f"{path}: {name!r} is {part.kind} of rank {part.rank} and alpha {part.alpha} on a shape of {part.shape}."
        )


def compact_indices(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """int32 where the parameter allows it: with a float32 value 8 bytes a trained element."""
    return indices.to(torch.int32 if torch.Size(shape).numel() < 2**31 else torch.int64).cpu()
