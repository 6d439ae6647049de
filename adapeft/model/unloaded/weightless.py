"""Execution of a model without weights, with real values for tensors that do not depend on them.

On the meta device, or on fake tensors, every tensor has a shape and no values. But positions, masks, token types and
loop bounds do not depend on the weights. Models branch on such values, use them as indices into tables, and derive
sizes from them, so shapes alone are not enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

LARGEST = 2**25
"""Maximum bytes of a tensor with values: enough for the boolean mask of 4,096 tokens, not for that of 100,000."""

_UNWRITTEN = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_SHAPE_ONLY = {aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full}
"""Operations that read the shape of a tensor but not its values."""


class BeyondTableError(IndexError):
    """An index is out of range for the tensor that it indexes.

    Attributes:
        table: the indexed tensor.
        size: size of the indexed dimension.
        index: an index out of range: the largest, or the lowest if only negative ones are.
    """

    def __init__(self, table: Tensor, size: int, index: int) -> None:
        super().__init__(f"index {index} is out of range for a table of {size}")
        self.table, self.size, self.index = table, size, index


class UnknownValueError(RuntimeError):
    """The model needs a value that depends on its weights."""


class Weightless(TorchDispatchMode):
    """Dispatch mode that tracks the values of tensors on the meta device that do not depend on weights.

    Enter it to build the model, so that it records the model's buffers, and again to run it.

    Args:
        selects_all: whether a mask that depends on weights counts as true everywhere, as an upper bound on its
            selection; otherwise it raises ``UnknownValueError``.

    Attributes:
        most_operations: number of operations per activation after which ``UnknownValueError`` is raised, because some
            models loop over tokens in Python; None: no limit.
    """

    def __init__(self, *, selects_all: bool = False) -> None:
        super().__init__()
        self.selects_all = selects_all
        self.most_operations: int | None = None
        self._done = 0
        # Bytes of the same layout by storage, so that views and writes into them need no special handling.
        self._bytes: WeakKeyDictionary[torch.UntypedStorage, Tensor] = WeakKeyDictionary()

    def __enter__(self) -> Self:
        self._done = 0
        return super().__enter__()

    def known(self, value: Tensor, device: str = "meta") -> Tensor:
        """Return a tensor with known values on the meta device, or in ``FakeTensorMode`` on any device."""
        return self._made(value, torch.device(device))

    def forget(self, tensors: Sequence[Tensor]) -> None:
        """Make the values of ``tensors`` unknown, such as initial values of parameters."""
        for tensor in tensors:
            self._bytes.pop(tensor.untyped_storage(), None)

    def carry(self, tensor: Tensor, other: Tensor) -> None:
        """Copy the values of ``tensor``, if known, to ``other``, which has the same shape."""
        value = self.value(tensor)
        if value is not None:
            self._keep(other, value)

    def value(self, tensor: Tensor) -> Tensor | None:
        """Return the values of a tensor, None if unknown. They are a view: writing to it changes them."""
        if not _is_weightless(tensor):
            return tensor
        flat = self._bytes.get(tensor.untyped_storage())
        if flat is None or tensor.is_conj() or tensor.is_neg():
            return None
        with _disable_current_modes():
            return flat.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._done += 1
        if self.most_operations is not None and self._done > self.most_operations:
            raise UnknownValueError(f"more than {self.most_operations:,} operations")
        self._check_indices(func, args)
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # Only its meta kernel is restricted to bfloat16.
            return func(*tree_map(_to_bfloat16, args), **kwargs).to(args[0].dtype)
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            return self._data_dependent(func, args, kwargs)
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = _written(func, args, kwargs)
        own = {tensor.untyped_storage() for tensor in inputs}
        if not written and all(tensor.untyped_storage() in own for tensor in tensors):
            return result  # a view
        fits = all(tensor.untyped_storage().nbytes() <= LARGEST for tensor in tensors)
        real = self._computed(func, args, kwargs) if fits else None
        if real is None:
            self.forget(written)
        elif not written:
            values = [leaf for leaf in tree_leaves(real) if isinstance(leaf, Tensor)]
            for tensor, value in zip(tensors, values, strict=True):
                if _is_weightless(tensor):
                    self._keep(tensor, value)
        return result

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of the operation on known values; None if a value is unknown."""
        if func.overloadpacket in _UNWRITTEN or torch.Tag.nondeterministic_seeded in func.tags:
            return None
        is_unknown = False

        def real(leaf: Any) -> Any:
            nonlocal is_unknown
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            if not isinstance(leaf, Tensor):
                return leaf
            value = self.value(leaf)
            if value is None and func.overloadpacket in _SHAPE_ONLY:
                return torch.empty((), dtype=leaf.dtype, device="cpu").expand(leaf.shape)
            is_unknown = is_unknown or value is None
            return value

        with _disable_current_modes():
            known_args, known_kwargs = tree_map(real, (args, kwargs))
            try:
                return None if is_unknown else func(*known_args, **known_kwargs)
            except NotImplementedError:  # CPUs lack kernels for some dtypes that only GPUs support
                return None

    def _data_dependent(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation whose output or output shape depends on values."""
        if func is aten.index.Tensor and not any(_is_mask(index) for index in args[1]):
            return func(*args, **kwargs)  # integer indices: the shape is known
        real = self._computed(func, args, kwargs)
        if real is None:
            if func is aten.index.Tensor:
                return func(args[0], self._as_numbers(args[1]))
            if not self.selects_all or func not in (aten.nonzero.default, aten.masked_select.default):
                raise UnknownValueError(f"{func} of values that depend on the weights")
            with _disable_current_modes():
                mask = torch.ones(args[-1].shape, dtype=torch.bool, device="cpu")
                real = mask.nonzero() if func is aten.nonzero.default else None
            if real is None:
                return args[0].new_empty(args[1].numel())
        device = next(leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return tree_map(lambda leaf: self._made(leaf, device) if isinstance(leaf, Tensor) else leaf, real)

    def _as_numbers(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Replace boolean masks by the integer indices that they select."""
        numbers: list[Tensor | None] = []
        for index in indices:
            if index is None or not _is_mask(index):
                numbers.append(index)
                continue
            value = self.value(index)
            if value is None and not self.selects_all:
                raise UnknownValueError("a mask that depends on the weights")
            with _disable_current_modes():
                value = torch.ones(index.shape, dtype=torch.bool, device="cpu") if value is None else value
                columns = value.nonzero(as_tuple=True)
            numbers += [self._made(column, index.device) for column in columns]
        return numbers

    def _made(self, value: Tensor, device: torch.device) -> Tensor:
        """Return a tensor without storage on ``device`` that has the known values ``value``."""
        tensor = torch.empty(value.shape, dtype=value.dtype, device=device)
        self._keep(tensor, value)
        return tensor

    def _keep(self, tensor: Tensor, value: Tensor) -> None:
        with _disable_current_modes():
            flat = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device="cpu")
            kept = flat.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            kept.copy_(value)
        self._bytes[tensor.untyped_storage()] = flat

    def _check_indices(self, func: Any, args: Any) -> None:
        """Raise ``BeyondTableError`` for a known index outside its table, which meta kernels do not check."""
        pairs: list[tuple[Tensor, int, Any]] = []
        if func is aten.embedding.default:
            pairs = [(args[0], 0, args[1])]
        elif func in (aten.gather.default, aten.index_select.default):
            pairs = [(args[0], args[1], args[2])]
        elif func is aten.index.Tensor and not any(_is_mask(index) for index in args[1]):
            pairs = [(args[0], dim, index) for dim, index in enumerate(args[1])]
        for table, dim, index in pairs:
            value = None if index is None else self.value(index)
            if value is None or not value.numel():
                continue
            size = table.shape[dim] if table.ndim else 1
            with _disable_current_modes():
                lowest, highest = int(value.min()), int(value.max())
            if highest >= size or lowest < (-size if func is aten.index.Tensor else 0):
                raise BeyondTableError(table, size, highest if highest >= size else lowest)


def _is_weightless(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _to_bfloat16(leaf: Any) -> Any:
    return leaf.bfloat16() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that the operation writes to."""
    written: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        written += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return written
