"""The result of inspecting a config before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from adapeft.config.config import Config
from adapeft.data.description import DataDescription
from adapeft.measure.groups import Groups
from adapeft.memory.limit import MemoryLimit


@dataclass(frozen=True)
class Inspection:
    """Facts about the run of a valid config.

    Attributes:
        config: the config, with what ``select.groups: auto`` stands for on this model.
        architecture: class name of the model.
        description: description of the data.
        groups: candidates, without a fingerprint.
        budget: budget in elements; approximate if it is given in bytes.
        limit: budget in bytes, if it is given in bytes.
        num_always_trained: number of elements trained outside the budget.
        model_config: config of the model, with the labels of the data.
        num_tokens: tokens of the longest example.
        notes: what tokenization has changed in the data.
        auto: what ``select.groups: auto`` stands for, if that is LoRA; empty otherwise.
    """

    config: Config
    architecture: str
    description: DataDescription
    groups: Groups
    budget: int
    num_always_trained: int
    model_config: PretrainedConfig
    num_tokens: int
    limit: MemoryLimit | None
    notes: tuple[str, ...] = ()
    auto: str = ""
