"""The base of a delta: a checkpoint on disk, and the structure of the task's model to name it for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from adapeft.errors import AdapeftError
from adapeft.inputs.checkpoint import Checkpoint, local_folder
from adapeft.inputs.model import CONFIG_ERRORS, build_structure
from adapeft.reading import reading
from adapeft.ship.delta import Delta


@dataclass(frozen=True)
class Base:
    """A base checkpoint for a task.

    Attributes:
        config: the checkpoint's own, with the task's labels.
        structure: the task's model on the meta device.
        checkpoint: the weights, under the names of ``structure``.
    """

    config: PretrainedConfig
    structure: PreTrainedModel
    checkpoint: Checkpoint


def open_base(name: str, task: str, labels: Mapping[str, Any], new: tuple[str, ...] = ()) -> Base:
    """Reads the config alone; weights are read when they are asked for.

    Args:
        name: folder or hub name of the base, with safetensors weights.
        task: ``sequence-classification`` or ``causal-lm``.
        labels: what the task sets in the config.
        new: parameters that the checkpoint does not hold.

    Raises:
        AdapeftError: no such base, or none with a config and safetensors.
    """
    folder = local_folder(name)
    with reading(f"--model {name!r}: no model", "Give a folder with config.json and weights.", *CONFIG_ERRORS):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels)
        structure = build_structure(config, task)
    return Base(config, structure, Checkpoint(name, structure, new))


def base_of(delta: Delta, name: str) -> Base:
    """The base of ``delta`` in the folder or under the hub name ``name``; its fingerprint is not checked yet.

    Raises:
        AdapeftError: no such base, none with safetensors, or the delta does not name its task.
    """
    described = delta.description.get("model")
    if not isinstance(described, dict):
        raise AdapeftError("the delta does not say which task it was trained for: apply it in Python instead.")
    return open_base(name, described["task"], described.get("labels", {}), tuple(delta.new))
