"""What data sets hold, and batches of their examples."""

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
    """What the labels of both splits are.

    ``names`` are the classes in the order of their numbers, or None where labels are numbers already (integers are
    their own class, floats are targets) or where there are none. ``num_outputs`` is how many outputs the model's head
    needs: the classes, 1 for regression, 0 for a language model, which has its own. ``problem_type`` is what
    transformers calls the loss of a classifier; None where it has one alone.
    """

    names: tuple[str, ...] | None = None
    num_outputs: int = 0
    problem_type: str | None = None


@dataclass(frozen=True)
class DataDescription:
    """What a model has to know of its data.

    ``label_names``, ``problem_type`` and ``num_labels`` are the ``names``, ``problem_type`` and ``num_outputs`` of its
    ``Labels``.

    By ``data.train`` and ``data.evaluation``: ``lines`` that ``num_lines`` has counted, and the ``content`` that was
    read, hashed. Two descriptions are equal whatever these are.
    """

    num_train: int
    num_evaluation: int
    label_names: tuple[str, ...] | None
    problem_type: str | None
    num_labels: int
    lines: Mapping[str, int | None] = dataclasses.field(default_factory=dict, compare=False)
    content: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Batch:
    """Examples side by side: n examples, T tokens after padding.

    ``inputs``: keyword arguments of the model's forward (``input_ids``, ``attention_mask`` … int64 [n, T]); those that
    are no tensors, such as ``max_length_q``, are shared by all examples. ``labels``: classes int64 [n], targets float32
    [n] or, for a language model, its own tokens int64 [n, T], not shifted, −100 on padding. ``ids``: int64 [n], where
    each example stands in its data set; whatever is drawn at random for an example is seeded by it, so that no batching
    changes the draw.
    """

    inputs: dict[str, Any]
    labels: Tensor
    ids: Tensor

    def example(self, index: int) -> Batch:
        """One of the examples, with the batch's padding.

        Raises:
            AdapeftError: a tensor among the inputs is not divided by example.
        """
        num_examples = len(self.labels)
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
        """The same batch on ``device``."""
        inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.ids.to(device))
