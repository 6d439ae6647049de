"""Loading of a pretrained model for a task, of its tokenizer, and of its structure without weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from adapeft.data.description import DataDescription
from adapeft.data.labels import Head
from adapeft.data.padding import set_padding, with_padding
from adapeft.errors import AdapeftError
from adapeft.model.activations import recompute_activations
from adapeft.model.checkpoint.checkpoint import is_tied
from adapeft.model.quantization import (
    check_quantization,
    put_stand_ins,
    quantization_settings,
    silence_casts,
    stored_quantization,
)
from adapeft.model.quantized import describe_quantization, keep_codes_in_place
from adapeft.model.structure import MISSING, always_trained
from adapeft.model.wrappers import wrapped_names
from adapeft.tasks.describe import describe
from adapeft.tasks.registry import TASKS

if TYPE_CHECKING:
    from adapeft.model.section import Model
    from adapeft.sections.data import Data

CONFIG_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, StrictDataclassError)
"""Errors that transformers raises for a model config that is missing, damaged or has a value of the wrong type."""


def load_model_config(
    model: Model,
    description: DataDescription,
    tokenizer: PreTrainedTokenizerBase,
    always_train: Sequence[str] = ("auto",),
) -> PretrainedConfig:
    """Return the model's own config, with the labels of the data and the padding of ``load_tokenizer``'s tokenizer.

    Its ``quantization_config`` is that of the checkpoint, or what ``model.quantization`` asks for.

    Args:
        model: the config's ``model`` section.
        description: description of the data.
        tokenizer: tokenizer of the model.
        always_train: patterns of ``select.always_train``; what they match is not quantized.

    Raises:
        AdapeftError: the model does not exist, its kind is wrong for the task, or ``model.quantization`` is impossible.
    """
    config = _own_config(model, attn_implementation=model.attn_implementation, **label_options(model.task, description))
    check_quantization(model, config)
    if TASKS[model.task].refuses_decoders and config.is_encoder_decoder:
        raise AdapeftError(
            f"model.task = {model.task}: {model.name!r} is an encoder-decoder, whose decoder reads the text that is to "
            f"be predicted. Name an encoder, or set model.task: seq2seq with the masked text as the source."
        )
    if not TASKS[model.task].reads_images:
        set_padding(config, tokenizer)
    # Budget and memory estimate must count the parameters that the loaded model will have.
    has_head = TASKS[model.task].has_head
    if not has_head and getattr(config, "tie_word_embeddings", False) and Path(model.name).is_dir():
        structure = build_structure(config, model.task, trust_remote_code=model.trust_remote_code)
        config.tie_word_embeddings = is_tied(Path(model.name), structure)
    if model.quantization in ("int8", "nf4") and not stored_quantization(config):
        structure = build_structure(config, model.task, trust_remote_code=model.trust_remote_code)
        config.quantization_config = quantization_settings(model, structure, always_train)
    return config


def trained_head(model: Model) -> Head | None:
    """Return the head for classes or targets that the model was saved with; None if it gets a new one.

    Raises:
        AdapeftError: the model does not exist.
    """
    task = TASKS[model.task]
    if not task.has_head:
        return None
    config = _own_config(model)
    head = Head.of_labels(config.id2label or {})
    architectures = getattr(config, "architectures", None) or []
    # A config without architectures that names classes: they belong to a trained head.
    is_trained = any(name.endswith(task.auto_class.removeprefix("AutoModel")) for name in architectures) or (
        not architectures and head.names is not None
    )
    return head if is_trained else None


def describe_for(model: Model, data: Data, head: Head | None = None) -> DataDescription:
    """Describe ``data`` for a run on ``model``, with classes numbered as in a head that is already trained.

    Args:
        model: the config's ``model`` section.
        data: the config's ``data`` section.
        head: a delta's head, which replaces the model's.

    Raises:
        AdapeftError: the model does not exist, or an error of ``describe``.
    """
    return describe(TASKS[model.task], data, head or trained_head(model))


def _own_config(model: Model, **options: Any) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code, **options
        )
    except CONFIG_ERRORS as error:
        raise AdapeftError(
            f"model.name = {model.name!r}: cannot be loaded ({_first_line(error)}). Give a folder with a config.json "
            f"and weights, or the name of a model on the hub."
        ) from error


def label_options(task: str, description: DataDescription) -> dict[str, Any]:
    """Return the options of a transformers config that the data's labels determine, in JSON types."""
    labels: dict[str, Any] = {}
    if TASKS[task].has_head:
        labels["num_labels"] = description.num_labels
        if description.label_names:
            labels["id2label"] = dict(enumerate(description.label_names))
            labels["label2id"] = {name: index for index, name in enumerate(description.label_names)}
        if description.problem_type is not None:
            labels["problem_type"] = description.problem_type
    return labels


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return a model's name, class, task (None if its class belongs to no task) and labels, in JSON types.

    The labels have the format of ``label_options``. For a quantized model, ``quantization`` is the type of its weights.
    """
    quantized = describe_quantization(model)
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return {"name": None, "architecture": type(model).__name__, "task": None, "labels": {}, **quantized}
    task = task_of(model)
    labels: dict[str, Any] = {}
    if task is not None and TASKS[task].has_head:
        labels["num_labels"] = config.num_labels
        names = list((config.id2label or {}).values())
        if names != [f"LABEL_{index}" for index in range(len(names))]:
            labels |= {
                "id2label": dict(enumerate(names)),
                "label2id": {name: index for index, name in enumerate(names)},
            }
        # transformers' models set it in their first forward pass with labels.
        problem_type = config.problem_type or ("regression" if config.num_labels == 1 else None)
        labels |= {"problem_type": problem_type} if problem_type else {}
    architecture = type(model).__name__.removeprefix("FSDP")
    described = {"name": config.name_or_path or None, "architecture": architecture, "task": task, "labels": labels}
    return described | quantized


def task_of(model: nn.Module) -> str | None:
    """Return the task for which transformers builds this class from the model's config; None for other classes."""
    config = getattr(model, "config", None)
    for name, task in TASKS.items():
        built = _auto_class(name)._model_mapping.get(type(config), None)
        classes = built if isinstance(built, tuple) else (built,)
        is_built = any(cls is not None and isinstance(model, cls) for cls in classes)
        if is_built and (not task.has_head or getattr(config, "problem_type", None) in task.problem_types):
            return name
    return None


def _auto_class(task: str) -> Any:
    return getattr(transformers, TASKS[task].auto_class)


def build_structure(config: PretrainedConfig, task: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model on the meta device: names, shapes and modules without weights.

    Layers that bitsandbytes quantizes during the loading are stand-ins; see ``adapeft.model.stand_in``.

    Raises:
        AdapeftError: models of this type have no head for the task, or the model or this machine does not support the
            config's attention implementation.
    """
    asked = config._attn_implementation
    try:
        with torch.device("meta"):
            structure: PreTrainedModel = _auto_class(task).from_config(config, trust_remote_code=trust_remote_code)
    except (ImportError, ValueError) as error:
        reason = _first_line(error)
        if reason.startswith("Unrecognized configuration class"):
            raise AdapeftError(
                f"model.task = {task}: transformers has no {config.model_type} model for this task. Give another "
                "model.name, or a task that this model supports."
            ) from error
        if asked is not None and (isinstance(error, ImportError) or "attention" in reason.lower()):
            raise AdapeftError(
                f"model.attn_implementation = {asked} is not available ({reason}). Leave it out, or install the "
                "required packages here and on the workers."
            ) from error
        raise
    put_stand_ins(structure)
    return structure


def load_model(model: Model, config: PretrainedConfig, seed: int, always_train: Sequence[str]) -> PreTrainedModel:
    """Load the pretrained model; a new head is initialized from ``seed``, the same in every process.

    Args:
        model: the config's ``model`` section.
        config: config from ``load_model_config``.
        seed: random seed of a new head.
        always_train: patterns of ``select.always_train``; parameters that match may be missing from the checkpoint.

    Raises:
        AdapeftError: the checkpoint lacks further parameters, which would stay random.
    """
    set_seed(seed)
    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if isinstance(getattr(config, "quantization_config", None), BitsAndBytesConfig):
        # In the config, transformers would take it for the quantization of the stored weights.
        config = copy(config)
        options["quantization_config"] = vars(config).pop("quantization_config")
    if stored_quantization(config):
        silence_casts()
    loaded, info = _auto_class(model.task).from_pretrained(
        model.name,
        config=config,
        dtype=getattr(torch, model.dtype),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        output_loading_info=True,
        **options,
    )
    if options:
        _leave_file(loaded)
    return finished(loaded, info, model, always_train)


def _leave_file(model: nn.Module) -> None:
    """Copy what is not quantized out of the mapped checkpoint.

    On a CPU these tensors are views of the file. While one of them exists, the pages from which the quantized weights
    were read stay in memory too: 43 MB next to the 11 MB of MiniLM's int8 codes.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def finished(
    loaded: PreTrainedModel, info: Mapping[str, Any], model: Model, always_train: Sequence[str]
) -> PreTrainedModel:
    """Return a model that transformers has loaded, with the settings of ``model``.

    Args:
        loaded: the model.
        info: transformers' report on loading it.
        model: the config's ``model`` section.
        always_train: patterns of ``select.always_train``.

    Raises:
        AdapeftError: the checkpoint lacks further parameters, which would stay random.
    """
    names = [name for name, _ in loaded.named_parameters()]
    random = sorted(set(info["missing_keys"]) & set(names) - always_trained(loaded, always_train))
    if random and (wrapped := wrapped_names(random, info["unexpected_keys"], loaded.base_model_prefix)):
        raise AdapeftError(f"model.name = {model.name!r}: the checkpoint has no {random[0]!r}: {wrapped}")
    if random:
        raise AdapeftError(
            f"model.name = {model.name!r}: the checkpoint has no {', '.join(random)}, which would be initialized at "
            f"random and frozen. Train them too: select.always_train: [auto, {', '.join(random)}]."
        )
    setattr(loaded, MISSING, tuple(name for name in names if name in info["missing_keys"]))
    loaded.config.use_cache = False
    keep_codes_in_place(loaded)
    if model.gradient_checkpointing:
        recompute_activations(loaded)
    return loaded


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with the padding that the model expects; see ``with_padding``.

    For tasks that read images it is the model's image processor.

    Raises:
        AdapeftError: the model has no tokenizer, or no image processor.
    """
    if TASKS[model.task].reads_images:
        return _load_processor(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise AdapeftError(
            f"model.name = {model.name!r}: its tokenizer cannot be loaded ({_first_line(error)})."
        ) from error
    return with_padding(tokenizer, _own_config(model))


def _load_processor(model: Model) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise AdapeftError(
            f"model.name = {model.name!r}: its image processor cannot be loaded ({_first_line(error)}). Give a folder "
            "with a preprocessor_config.json."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
