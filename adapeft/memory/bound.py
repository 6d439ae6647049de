"""An upper bound on the memory of a forward and backward pass, from the shapes of the parameters alone.

Used for models whose pass cannot be traced without weights. It assumes that every token passes through every parameter,
in each module that holds it, and that each such use keeps at most ``COPIES`` float32 tensors of the parameter's input
and output widths: the tensors that autograd saves for the layer and the element-wise functions around it, and their
gradients. Every attention head keeps as many tensors of size T².

    bytes ≤ 4 · COPIES · (n · Σ widths + layers · heads · examples · T²), n = examples · T

Every token is assumed to pass through every expert, and a layer that is called several times counts each time. Savings
from gradient checkpointing are ignored. The bound is therefore loose, mostly several times the actual memory, and is
only used to report how much may be needed, never to refuse a run. Not covered are recurrent layers that keep a matrix
per token in a shape that no parameter has, such as xLSTM's.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapeft.memory.estimate import FLOAT32, Pass

COPIES = 12
"""Number of tensors kept per token for each parameter; see ``tests/adapeft/memory/test_architectures.py``."""

_MATRICES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bound_pass(model: PreTrainedModel, num_examples: int, num_tokens: int) -> Pass:
    """Return an upper bound on the bytes of one micro-batch."""
    tokens = num_examples * num_tokens
    kept = tokens * _widths(model) * _calls(model) + _scores(model.config) * num_examples * num_tokens**2
    activations = FLOAT32 * COPIES * kept
    parameters = list(model.parameters())
    trained = sum(parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad)
    # A parameter that is used several times has one gradient per use before they are summed; the gradients of single
    # elements and of one expert come from a tensor of the whole parameter's size.
    transient = trained + 2 * max(parameter.numel() * parameter.element_size() for parameter in parameters)
    return Pass(activations + transient, activations + transient + trained)


def _widths(model: nn.Module) -> int:
    """Return the sum of the input and output widths of all parameters in all modules."""
    return sum(
        _width(module, parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module.parameters(recurse=False)
    )


def _width(module: nn.Module, parameter: torch.Tensor) -> int:
    shape = parameter.shape
    if isinstance(module, nn.Embedding):
        return shape[-1]
    if parameter.ndim < 2:
        return parameter.numel()
    if isinstance(module, _MATRICES):
        return shape[0] + math.prod(shape[1:])
    if parameter.ndim == 2:
        return parameter.numel()  # one state of this shape per token, as in state-space models
    return math.prod(shape[:-2]) * (shape[-2] + shape[-1])  # experts


def _calls(model: PreTrainedModel) -> int:
    """Return how often each layer is called: more than once if the config has more layers than the model (ALBERT)."""
    lists = [len(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(1, math.ceil(_largest(model.config, "num_hidden_layers") / max(lists, default=1)))


def _scores(config: PretrainedConfig) -> int:
    """Return the number of attention heads in all layers: of self-attention and of a decoder's cross-attention."""
    layers = _largest(config, "num_hidden_layers") + 2 * _largest(config, "num_decoder_layers", "decoder_layers")
    return layers * _largest(config, "num_attention_heads", "decoder_attention_heads")


def _largest(config: PretrainedConfig, *names: str) -> int:
    """Return the largest of these fields in the config, its sub-configs and, if layers differ, its layer configs."""
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]
    parts += [layer for part in parts if part.is_heterogeneous for layer in part.per_layer_config]
    given = (_number(part, name) for part in parts for name in names)
    return max(given, default=0)


def _number(config: PretrainedConfig, name: str) -> int:
    try:
        value = getattr(config, name, 0)
    except RuntimeError:  # the field differs between layers; the layers' own configs are read instead
        return 0
    return value if isinstance(value, int) else 0
