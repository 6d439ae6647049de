"""Conversion of a checkpoint's tensors by transformers' own operations, such as the fusion of experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, dot_natural_key

from adapeft.model.checkpoint.shard import opened


@dataclass(frozen=True)
class _Source:
    """A tensor in a file, and the pattern of the converter that its name matches."""

    key: str
    pattern: str
    shard: Path
    shape: tuple[int, ...]


class Conversion:
    """What one converter of transformers makes of some tensors of weight files: mostly one fused parameter.

    Args:
        name: name in the model of the first of the tensors that it makes.
        converter: a converter that holds no tensors.
        structure: the model, possibly on the meta device.

    Attributes:
        shapes: name in the model → shape of the tensors that it makes, once ``find_shapes`` has found them.
    """

    def __init__(self, name: str, converter: WeightConverter, structure: PreTrainedModel) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._name, self._converter, self._structure = name, converter, structure
        self._sources: list[_Source] = []

    def add(self, key: str, pattern: str, shard: Path, shape: tuple[int, ...]) -> None:
        """Add a tensor of the files.

        Args:
            key: its name in the file.
            pattern: pattern of the converter that the name matches.
            shard: the file.
            shape: its shape.
        """
        self._sources.append(_Source(key, pattern, shard, shape))

    def find_shapes(self) -> None:
        """Find ``shapes``, with the operations on tensors without values; raises what an operation raises."""
        made = self._converted(lambda source: torch.empty(source.shape, device="meta"))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}

    def convert(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Return name → tensor in the order of ``shapes``, read from the files.

        Args:
            dtype: dtype to which floating-point tensors are cast first if parameters are made of them; None for that of
                the files.
        """
        makes_parameter = isinstance(self._structure.get_parameter_or_buffer(self._name), nn.Parameter)
        with ExitStack() as stack:
            files = {shard: stack.enter_context(opened(shard)) for shard in {source.shard for source in self._sources}}

            def read(source: _Source) -> Tensor:
                tensor = files[source.shard].read(source.key)
                is_cast = makes_parameter and dtype is not None and tensor.is_floating_point()
                return tensor.to(dtype) if is_cast else tensor

            return self._converted(read)

    def _converted(self, read: Callable[[_Source], Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(self._converter)
        # The order in which transformers adds them, which is that of the experts.
        for source in sorted(self._sources, key=lambda source: dot_natural_key(source.key)):
            future: Any = partial(read, source)  # which transformers calls
            converter.add_tensor(self._name, source.key, source.pattern, future)
        made = converter.convert(self._name, model=self._structure, config=self._structure.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
