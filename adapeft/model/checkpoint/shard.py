"""One weight file of a checkpoint: the names, shapes and values of its tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from zipfile import is_zipfile

from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import load_state_dict

from adapeft.files.damage import reading


class Shard(Protocol):
    """An open file. Its tensors are views of the mapped file, so that they take no memory of their own."""

    def keys(self) -> Iterable[str]:
        """Return the names in the file."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    def read(self, key: str) -> Tensor:
        """Return a tensor."""


def can_be_mapped(file: Path) -> bool:
    """Whether the tensors of a weight file can be read one at a time: not if torch before 1.6 has pickled them."""
    return file.suffix == ".safetensors" or is_zipfile(file)


@contextmanager
def opened(file: Path) -> Iterator[Shard]:
    """Open safetensors or a pickled file; raises ``AdapeftError`` if it is damaged."""
    if file.suffix != ".safetensors":
        with reading(f"{file} is not a file of weights, or it is truncated", "Download the base again."):
            pickled = _Pickled(load_state_dict(file))  # as transformers reads it: mapped, and nothing but tensors
        yield pickled
        return
    with reading(f"{file} is not a safetensors file, or it is truncated", "Download the base again."):
        safetensors = safe_open(file, framework="pt")
    with safetensors:
        yield _Safetensors(safetensors)


class _Safetensors:
    def __init__(self, file: Any) -> None:
        self._file = file

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor


class _Pickled:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{key!r} is a {type(value).__name__}, not a tensor")
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def read(self, key: str) -> Tensor:
        return self._tensors[key]
