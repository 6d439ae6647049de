"""Loading of a base model of which a rank never holds more than its share and one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.utils import logging

from adapeft.model.load import finished, load_model
from adapeft.model.quantization import stored_quantization
from adapeft.model.unloaded.unloaded import NeedsLoadingError, Unloaded, open_unloaded

if TYPE_CHECKING:
    from adapeft.model.section import Model


class Division(Protocol):
    """A division of parameters over ranks."""

    @property
    def reads(self) -> bool:
        """Whether this rank reads the checkpoint; it sends the values to the others."""

    def divide(self, parameter: nn.Parameter) -> None:
        """Replace ``parameter`` by this rank's share of the values of the rank that reads. Collective."""


def load_divided(
    model: Model, config: PretrainedConfig, seed: int, always_train: Sequence[str], division: Division
) -> PreTrainedModel:
    """Load the model of ``load_model`` and divide it. Collective.

    One rank reads the checkpoint, one tensor at a time, converts it as transformers does (fused experts), and each is
    divided before the next is read. If that is impossible (``open_unloaded``), every rank loads the whole model first.
    A quantized base stays whole until there is an engine: its fingerprint counts codes of whole tensors.

    Args:
        model: the config's ``model`` section.
        config: config from ``load_model_config``.
        seed: random seed of a new head.
        always_train: patterns of ``select.always_train``; parameters that match may be missing from the checkpoint.
        division: division over the ranks.

    Raises:
        AdapeftError: see ``load_model``.
    """
    if stored_quantization(config):
        return load_model(model, config, seed, always_train)
    # DeepSpeed casts whole parameters to the dtype of its config, also those that transformers keeps in float32.
    dtype = getattr(torch, model.dtype)
    try:
        base = open_unloaded(model, config, always_train)
    except NeedsLoadingError:
        loaded = load_model(model, config, seed, always_train)
        for parameter in loaded.parameters():
            # A view of a mapped file: the values that a rank receives would stay in memory until the file is unmapped.
            parameter.data = parameter.data.to(dtype, copy=True)
            division.divide(parameter)
        return loaded
    loaded = _without_values(base, model, config, seed, always_train)
    parameters = dict(loaded.named_parameters())
    for name, tensor in _stored(base, parameters, dtype, reads=division.reads):
        parameter = parameters.pop(name)
        parameter.data = tensor.to(dtype).contiguous()  # pickled tensors may be views with any strides
        division.divide(parameter)
    for parameter in parameters.values():  # new, with the same values on every rank
        parameter.data = parameter.data.to(dtype)
        division.divide(parameter)
    return loaded


def _without_values(
    base: Unloaded, model: Model, config: PretrainedConfig, seed: int, always_train: Sequence[str]
) -> PreTrainedModel:
    """Return the loaded model with stored parameters that take no memory: all their elements are one number.

    transformers initializes new parameters, computes buffers and ties weights as it does for the real values.
    """
    structure, stored = base.structure, base.checkpoint.stored()
    buffers = {name for name, _ in structure.named_buffers()} & stored
    state: dict[str, Tensor] = {**base.checkpoint.read(buffers)}
    configured = structure.get_expanded_tied_weights_keys(all_submodels=True)
    untied = configured.keys() - structure.all_tied_weights_keys.keys()
    for name in stored - buffers:
        # transformers ties two stored weights only if they are equal.
        value = torch.full((), float(name in untied), dtype=getattr(torch, model.dtype))
        state[name] = value.expand(structure.get_parameter(name).shape)
    set_seed(seed)
    logging.disable_progress_bar()
    cls: Any = type(structure)
    loaded, info = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=getattr(torch, model.dtype), output_loading_info=True
    )
    loaded.config.name_or_path = loaded.name_or_path = model.name
    return finished(loaded, info, model, always_train)


def _stored(
    base: Unloaded, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype, *, reads: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored parameters in the order of the files; without ``reads``, tensors of any values in ``dtype``."""
    checkpoint, names = base.checkpoint, set(parameters)
    if reads:
        yield from checkpoint.tensors(names)
        return
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for name in checkpoint.order():
        if name in shapes:
            yield name, torch.empty(shapes[name], dtype=dtype)
