"""The base of a delta: a checkpoint on disk, whose weights have the names of the task's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from adapeft.data.padding import set_padding, with_padding
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.files.damage import reading
from adapeft.model.checkpoint.checkpoint import Checkpoint, open_checkpoint
from adapeft.model.checkpoint.files import local_folder
from adapeft.model.load import CONFIG_ERRORS, build_structure
from adapeft.tasks.registry import TASKS


@dataclass(frozen=True)
class Base:
    """A base checkpoint for a task.

    Attributes:
        checkpoint: weights under the names of ``structure``.
        tokenizer: tokenizer that pads as ``config`` expects, to be saved with a merged model; None if the base's
            tokenizer does so.
    """

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def structure(self) -> PreTrainedModel:
        """The task's model, on the meta device unless its weights can only be loaded as a whole."""
        return self.checkpoint.structure

    @property
    def config(self) -> PretrainedConfig:
        """Config of the checkpoint with the task's labels."""
        return self.structure.config


def open_base(name: str, task: str, labels: Mapping[str, Any], revision: str | None = None) -> Base:
    """Read the config and the names of the weights; the weights are read on demand.

    Args:
        name: folder or hub name of the base.
        task: name of the task.
        labels: options of the config that the task sets.
        revision: branch, tag or commit of a hub model.

    Raises:
        AdapeftError: there is no such base, or it has no config or weights.
    """
    folder = local_folder(name, revision)
    with reading(f"--model {name!r}: is not a model", "Give a folder with config.json and weights.", *CONFIG_ERRORS):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels)
        tokenizer = _repadded(folder, config, task)
        structure = build_structure(config, task)
    return Base(open_checkpoint(name, structure, revision), tokenizer)


def base_of(delta: Delta, name: str, revision: str | None = None) -> Base:
    """Open the base ``name``, a folder or hub name, for the task of ``delta``; the fingerprint is not checked here.

    Raises:
        AdapeftError: there is no such base, it has no weights, or the delta does not name a task.
    """
    described = delta.description.get("model") or {}
    task, architecture = described.get("task"), described.get("architecture")
    if task is None:
        trained_on = f"was trained on a {architecture}" if architecture else "does not name the model it was trained on"
        raise AdapeftError(
            f"the delta {trained_on}, and does not name its task: merge and export support {' and '.join(TASKS)}. Load "
            f"that model in Python instead, and call adapeft.Delta.load(path).apply(model) and then "
            f"model.save_pretrained(out)."
        )
    return open_base(name, task, described.get("labels", {}), revision)


def _repadded(folder: Path, config: PretrainedConfig, task: str) -> PreTrainedTokenizerBase | None:
    """Set the padding of ``config`` to that of a run; return a tokenizer if the base's would pad differently, or None.

    Classifiers look for the last token that is not padding, so config and tokenizer have to agree on it.
    """
    try:
        own = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):  # a base without a tokenizer
        return None
    padding = with_padding(own, config)
    if not TASKS[task].has_head:  # nothing looks for the last token, and generation needs the tokenizer's own side
        if getattr(config.get_text_config(), "pad_token_id", None) is None:
            set_padding(config, padding)
        return None
    set_padding(config, padding)
    is_same = (own.pad_token_id, own.padding_side) == (padding.pad_token_id, padding.padding_side)
    return None if is_same else padding
