"""A bound on what a forward and backward pass keeps alive, from the shapes of the parameters alone.

For models whose pass cannot be followed without weights. Every token passes through every parameter, in each module
that holds it, and leaves there at most ``COPIES`` tensors in float32 of the widths of the parameter's input and output:
what autograd keeps of the layer and of the element-wise functions around it, and their gradients. Every attention head
leaves as many of the squared length.

    bytes ≤ 4 · COPIES · (n · Σ widths + layers · heads · examples · T²), n = examples · T

An expert is passed by every token, whatever the router; a layer that is called several times counts as often. Nothing
is recomputed, whatever gradient checkpointing would save. So it is wide, mostly several times what is really kept, and
serves to tell what may be needed, never to refuse a run. Not covered are recurrent layers that keep a matrix for each
token which no parameter has the shape of, as xLSTM's.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapeft.memory.estimate import FLOAT32, Pass

COPIES = 12
"""Tensors that a parameter leaves behind for each token; see ``tests/adapeft/memory/test_architectures.py``."""

_MATRICES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bound_pass(model: PreTrainedModel, num_examples: int, num_tokens: int) -> Pass:
    """Bytes of a micro-batch, at most."""
    tokens = num_examples * num_tokens
    kept = tokens * _widths(model) * _calls(model) + _scores(model.config) * num_examples * num_tokens**2
    activations = FLOAT32 * COPIES * kept
    parameters = list(model.parameters())
    trained = sum(parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad)
    # A parameter that is used several times has as many gradients before they are summed; those of single elements and
    # of one expert come from a tensor of the whole parameter's size.
    transient = trained + 2 * max(parameter.numel() * parameter.element_size() for parameter in parameters)
    return Pass(activations + transient, activations + transient + trained)


def _widths(model: nn.Module) -> int:
    """Input and output widths of all parameters in all modules, summed."""
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
        return parameter.numel()  # a state of this shape for each token, as in state-space models
    return math.prod(shape[:-2]) * (shape[-2] + shape[-1])  # experts


def _calls(model: PreTrainedModel) -> int:
    """How often a layer is called where there are more layers in the config than in the model, as in ALBERT."""
    lists = [len(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(1, math.ceil(_largest(model.config, "num_hidden_layers") / max(lists, default=1)))


def _scores(config: PretrainedConfig) -> int:
    """Attention heads of all layers: of self-attention, and of a decoder's on its encoder."""
    layers = _largest(config, "num_hidden_layers") + 2 * _largest(config, "num_decoder_layers", "decoder_layers")
    return layers * _largest(config, "num_attention_heads", "decoder_attention_heads")


def _largest(config: PretrainedConfig, *names: str) -> int:
    """Of these numbers in the config, the configs within it and, where layers differ, those of its layers."""
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]
    parts += [layer for part in parts if part.is_heterogeneous for layer in part.per_layer_config]
    given = (_number(part, name) for part in parts for name in names)
    return max(given, default=0)


def _number(config: PretrainedConfig, name: str) -> int:
    try:
        value = getattr(config, name, 0)
    except RuntimeError:  # layers differ in it, and each has its own
        return 0
    return value if isinstance(value, int) else 0
