"""Descriptions of the data and its labels, and batches of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapeft.errors import AdapeftError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """The labels of both splits.

    Attributes:
        names: names of the classes in the order of their numbers; None if the labels are numbers (integers are class
            numbers, floats are targets) or if there are none.
        num_outputs: number of outputs that the model's head needs: the number of classes, 1 for regression, 0 for a
            language model, which has its own head.
        problem_type: name of a classifier's loss in transformers; None for a task with only one loss.
    """

    names: tuple[str, ...] | None = None
    num_outputs: int = 0
    problem_type: str | None = None


@dataclass(frozen=True)
class DataDescription:
    """Properties of the data on which the model and its training depend.

    ``label_names``, ``problem_type`` and ``num_labels`` are the ``names``, ``problem_type`` and ``num_outputs`` of
    ``Labels``. ``lines`` (counted by ``num_lines``) and ``content`` (hashes of the rows) are by ``data.train`` and
    ``data.evaluation``; they do not count in comparisons. ``num_train`` is None for a stream.
    """

    num_train: int | None
    num_evaluation: int
    label_names: tuple[str, ...] | None
    problem_type: str | None
    num_labels: int
    lines: Mapping[str, int | None] = dataclasses.field(default_factory=dict, compare=False)
    content: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def training(self) -> str:
        """Number of training rows, for messages."""
        return "streamed" if self.num_train is None else f"{self.num_train:,}"


@dataclass(frozen=True)
class Batch:
    """A batch of n examples with T tokens each after padding, or packed into fewer rows of T tokens.

    Attributes:
        inputs: keyword arguments of the model's forward (``input_ids``, ``attention_mask`` … int64 [n, T]); values that
            are not tensors, such as ``max_length_q``, are shared by all examples.
        labels: int64 [n] classes, float32 [n] targets or, for a language model, int64 [n, T] tokens of the input or
            of an encoder-decoder's target, not shifted, −100 on padding.
        ids: int64 [n], indices of the examples in their data set. They seed everything that is drawn for an example,
            so that draws do not depend on the batching.
        example_of: int64 [rows, T], the place in ``ids`` of each token's example, −1 on padding; None: one example
            per row.
    """

    inputs: dict[str, Any]
    labels: Tensor
    ids: Tensor
    example_of: Tensor | None = None

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of each example [n] over values of tokens [rows, T]."""
        if self.example_of is None:
            return values.sum(1)
        sums = values.new_zeros(len(self.ids) + 1)
        return sums.index_add(0, self.example_of.flatten() + 1, values.flatten())[1:]

    def example(self, index: int) -> Batch:
        """Return one example as a batch, with the padding of this batch.

        Raises:
            AdapeftError: the first dimension of an input tensor is not the number of examples.
        """
        num_examples = len(self.ids)
        if num_examples == 1:
            return self
        one = slice(index, index + 1)
        inputs = {}
        for name, value in self.inputs.items():
            if hasattr(value, "shape") and value.shape[:1] != (num_examples,):
                raise AdapeftError(
                    f"{name!r} of shape {list(value.shape)} cannot be divided into the {num_examples} examples of its "
                    "batch. Give batches of one example each."
                )
            inputs[name] = value[one] if hasattr(value, "shape") else value
        return Batch(inputs, self.labels[one], self.ids[one])

    def to(self, device: torch.device | str) -> Batch:
        inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in self.inputs.items()}
        example_of = None if self.example_of is None else self.example_of.to(device)
        return Batch(inputs, self.labels.to(device), self.ids.to(device), example_of)
