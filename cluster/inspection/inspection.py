"""What is known of a run before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from adapeft.data.description import DataDescription
from adapeft.measure.groups import Groups
from adapeft.memory.limit import MemoryLimit


@dataclass(frozen=True)
class Inspection:
    """A config found good.

    Attributes:
        architecture: class of the model.
        description: of the data.
        groups: the candidates, without a fingerprint.
        budget: in elements; about, where it is given in bytes.
        limit: the budget in bytes, where it is.
        num_always_trained: elements outside the budget.
        model_config: of the model, with the labels of the data.
        num_tokens: of the longest example.
    """

    architecture: str
    description: DataDescription
    groups: Groups
    budget: int
    num_always_trained: int
    model_config: PretrainedConfig
    num_tokens: int
    limit: MemoryLimit | None
