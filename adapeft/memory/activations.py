"""Peak memory of a forward and backward pass, counted on fake tensors (shapes without storage).

The model's own code runs, with its attention kernels, dropout, gradient checkpointing and attached leaves, so nothing
is assumed about the architecture. It runs CPU kernels; GPU kernels save the same tensors, except for dropout. Where
the code needs a value that depends on the weights, a bound from shapes is used instead (``adapeft.memory.bound``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from adapeft.data.description import Batch
from adapeft.memory.bound import bound_pass
from adapeft.memory.estimate import Pass
from adapeft.memory.heap import Held, held_bytes
from adapeft.model.load import build_structure
from adapeft.model.stand_in import StandIn
from adapeft.model.unloaded.fake import to_fake
from adapeft.model.unloaded.weightless import Weightless
from adapeft.tasks.losses.objective import Objective


@dataclass(frozen=True)
class Counted:
    """Sizes of a model and the memory of its forward and backward pass.

    Attributes:
        passes: bytes of one micro-batch.
        sizes: number of elements of each parameter that is not quantized.
        num_trained: number of elements that get gradients.
        packed: bytes of the quantized weights.
        held: on a CPU, what glibc holds for ``passes`` with their gradients, by its threshold.
        unknown: reason why the pass could not be traced and ``passes`` is only a bound; None if it was traced.
    """

    passes: Pass
    sizes: tuple[int, ...]
    num_trained: int
    packed: int = 0
    held: Mapping[int, Held] = field(default_factory=dict)
    unknown: str | None = None


def count_pass(
    config: PretrainedConfig,
    task: str,
    prepare: Callable[[PreTrainedModel], Any],
    objective: Objective,
    *,
    num_examples: int,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    thresholds: Sequence[int] = (),
    trust_remote_code: bool = False,
) -> Counted:
    """Run one micro-batch forward and backward without weights and count its memory.

    Args:
        config: configuration of the model.
        task: the config's ``model.task``.
        prepare: function that sets the mode and ``requires_grad``, enables checkpointing and attaches a subset.
        objective: the loss.
        num_examples: number of examples in the micro-batch.
        num_tokens: number of tokens per example.
        dtype: dtype of the weights.
        thresholds: thresholds of glibc for which to count what it holds; see ``adapeft.memory.heap``.
        trust_remote_code: as in ``from_pretrained``.

    Returns:
        The counted bytes, or a bound if the model's code cannot run without weights.
    """
    weightless = Weightless(selects_all=True)
    with weightless:
        model = build_structure(config, task, trust_remote_code=trust_remote_code)
    weightless.forget(list(model.parameters()))
    model.config.use_cache = False
    prepare(model)
    unknown = None
    with FakeTensorMode(allow_non_fake_inputs=True), weightless, torch.random.fork_rng(devices=[]):
        to_fake(model, dtype, weightless)
        try:
            batch = repeated_token(model.config, objective, num_examples, num_tokens)
            passes, held = _followed(model, objective, batch, thresholds)
        except Exception as error:  # the model's own code may raise anything without weights, and still run with them
            unknown = str(error).strip().partition("\n")[0] or type(error).__name__
    if unknown is not None:
        passes = bound_pass(model, num_examples * objective.num_texts, num_tokens)
        most = passes.with_gradients + passes.activations // 2  # more than in any pass that was followed
        held = dict.fromkeys(thresholds, Held(most, most))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    stand_ins = [module for module in model.modules() if isinstance(module, StandIn)]
    quantized = {module._parameters["weight"] for module in stand_ins}
    sizes = tuple(parameter.numel() for parameter in model.parameters() if parameter not in quantized)
    return Counted(passes, sizes, trained, sum(module.num_bytes for module in stand_ins), held, unknown)


def _followed(
    model: nn.Module, objective: Objective, batch: Batch, thresholds: Sequence[int]
) -> tuple[Pass, dict[int, Held]]:
    """Return the peak memory of a forward and backward pass of the batch, and ``Counted.held``."""
    with _Allocations() as allocations:
        allocations.start_with([*model.parameters(), *model.buffers(), *batch.inputs.values(), batch.labels])
        objective.loss(model, batch).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    peak = allocations.peak()
    held = {threshold: allocations.held(threshold) for threshold in thresholds}
    return Pass(allocations.peak(without=gradients), peak), held


def image_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return channels, height and width of the images of a model; 224 pixels if its config has no size, as ResNet's."""
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return getattr(config, "num_channels", 3), height, width


def repeated_token(config: PretrainedConfig, objective: Objective, num_examples: int, num_tokens: int) -> Batch:
    """Return examples of one repeated ordinary token, each ending in EOS: encoder-decoders classify by its state.

    Images are black, of the size that the model is configured for.
    """
    if objective.reads_images:
        return Batch(
            {"pixel_values": torch.zeros(num_examples, *image_shape(config))},
            objective.any_labels(torch.zeros(num_examples, 1), config.num_labels or 1),
            torch.arange(num_examples),
        )
    text = config.get_text_config()
    special = [getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")]
    ids = torch.full((num_examples, num_tokens), next(token for token in range(5) if token not in special))
    end = special[2]
    if isinstance(end, int) and end < getattr(text, "vocab_size", 0):
        ids[:, -1] = end
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if objective.num_texts > 1:
        inputs = {name: value[:, None].repeat(1, objective.num_texts, 1) for name, value in inputs.items()}
    return Batch(inputs, objective.any_labels(ids, config.num_labels or 1), torch.arange(num_examples))


class _Allocations(TorchDispatchMode):
    """Records when each storage is allocated and freed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._sizes: list[int] = []
        self._events: list[tuple[int, int]] = []

    def start_with(self, tensors: list[Tensor]) -> None:
        """Register storages that exist already and are not counted."""
        for tensor in tensors:
            self._numbers[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def peak(self, without: list[Tensor] | None = None) -> int:
        """Return the most bytes alive at once, without the storages of the tensors in ``without``."""
        sizes = np.array(self._sizes, dtype=np.int64)
        for tensor in without or []:
            number = self._numbers.get(tensor.untyped_storage(), -1)
            if number >= 0:
                sizes[number] = 0
        if not self._events:
            return 0
        numbers, signs = np.array(self._events, dtype=np.int64).T
        return int(np.cumsum(sizes[numbers] * signs).max(initial=0))

    def held(self, threshold: int) -> Held:
        """Return the most bytes that glibc's allocator would hold."""
        return held_bytes(self._sizes, self._events, threshold)

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._numbers:
            return
        number = len(self._sizes)
        self._numbers[storage] = number
        self._sizes.append(storage.nbytes())
        self._events.append((number, 1))
        weakref.finalize(storage, self._events.append, (number, -1))
