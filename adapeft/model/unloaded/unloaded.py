"""A base model that is not loaded: its structure, and its checkpoint, read one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedModel

from adapeft.errors import AdapeftError
from adapeft.model.checkpoint.checkpoint import StoredCheckpoint, open_stored
from adapeft.model.checkpoint.files import local_folder
from adapeft.model.load import build_structure
from adapeft.model.structure import MISSING, always_trained
from adapeft.model.unloaded.weightless import Weightless

if TYPE_CHECKING:
    from adapeft.model.section import Model


class NeedsLoadingError(Exception):
    """What is asked of a model can be found out only after loading it."""


class OnlyWholeError(NeedsLoadingError):
    """The weights of a model cannot be read one tensor at a time: a process that loads them holds all of them."""


@dataclass(frozen=True)
class Unloaded:
    """A base model for a task, as ``load_model`` would load it.

    Attributes:
        structure: the model on the meta device, which knows its new parameters.
        weightless: the mode that holds the values of its buffers.
        checkpoint: its weights.
    """

    structure: PreTrainedModel
    weightless: Weightless
    checkpoint: StoredCheckpoint


def open_unloaded(model: Model, config: PretrainedConfig, always_train: Sequence[str]) -> Unloaded:
    """Open the base model without reading its weights, except those whose ties they decide.

    Args:
        model: the config's ``model`` section.
        config: config from ``load_model_config``.
        always_train: patterns of ``select.always_train``.

    Raises:
        NeedsLoadingError: loading changes the weights or is likely to fail, so that only the loaded model is certain.
        OnlyWholeError: the base is quantized, or its weights cannot be read one tensor at a time.
    """
    structure, weightless = build_unloaded(model, config)
    try:
        folder = local_folder(model.name, model.revision)
        checkpoint = open_stored(folder, model.name, structure, getattr(torch, model.dtype))
    except AdapeftError as error:
        raise NeedsLoadingError(f"its weights cannot be opened ({error})") from error
    if checkpoint is None:
        raise OnlyWholeError("torch before 1.6 has pickled its weights")
    if checkpoint.obstacle is not None:
        raise OnlyWholeError(checkpoint.obstacle)
    if checkpoint.mismatched:
        raise NeedsLoadingError(f"the checkpoint has another shape of {min(checkpoint.mismatched)!r}")
    stored = checkpoint.stored()
    missing = [name for name, _ in structure.named_parameters() if name not in stored]
    trained = always_trained(structure, always_train)
    computed = structure._keys_to_ignore_on_load_missing or ()
    for name in missing:
        if name not in trained or any(re.search(pattern, name) for pattern in computed):
            raise NeedsLoadingError(f"the checkpoint has no {name!r}")
    setattr(structure, MISSING, tuple(missing))
    return Unloaded(structure, weightless, checkpoint)


def build_unloaded(model: Model, config: PretrainedConfig) -> tuple[PreTrainedModel, Weightless]:
    """Build the structure on the meta device and return it with the mode that holds the values of its buffers.

    Raises:
        OnlyWholeError: the base is quantized, so that loading replaces modules.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise OnlyWholeError("the base is quantized")
    weightless = Weightless()
    with weightless:
        structure = build_structure(config, model.task, trust_remote_code=model.trust_remote_code)
    weightless.forget(list(structure.parameters()))
    structure.config.use_cache = False
    return structure, weightless
