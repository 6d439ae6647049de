"""Adapter leaves: a bottleneck after a linear layer, owned by that layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapeft.choose.subset import Part

_LEAVES = ("down", "down_bias", "up", "up_bias")
_INITIAL_STD = 0.02
"""Of the projection down; BERT's own, and near to Houlsby's 0.01. The projection up starts at zero."""


def add_adapter(module: nn.Module, name: str, part: Part, seed: int) -> dict[str, nn.Parameter]:
    """Makes ``module``, a linear layer with the weight ``name``, end in a bottleneck with a residual.

    y + W_up·gelu(W_down·y + b_down) + b_up for the layer's own output y. Projection up and its bias start at zero, so
    that the output is the base's, bit for bit. Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML
    2019, section 2.1: after the projection back to the model's width and before the skip connection.

    As leaves do, the module becomes a subclass of its own class, so that its names stay and ZeRO-3 gathers all of it.

    Returns:
        The leaves by name, float32.
    """
    device = module.get_parameter("weight").device
    generator = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
    leaves = {}
    for leaf, shape in part.factor_shapes.items():
        value = torch.zeros(shape)
        if leaf == "adapter_down":
            value = _INITIAL_STD * torch.randn(shape, generator=generator)
        leaves[leaf] = nn.Parameter(value.to(device))
    install_adapter(module, leaves)
    return leaves


def install_adapter(module: nn.Module, leaves: Mapping[str, nn.Parameter]) -> None:
    """Makes ``leaves`` those of ``module``."""
    module.__class__ = _class_with_adapter(type(module))  # type: ignore[arg-type]
    for leaf, parameter in leaves.items():
        module.register_parameter(leaf, parameter)


def remove_adapter(module: nn.Module) -> None:
    """Gives ``module`` its own class back, where it has an adapter."""
    if isinstance(module, _WithAdapter):
        for name in [name for name in module._parameters if name.startswith("adapter_")]:
            delattr(module, name)
        module.__class__ = type(module).__bases__[1]


class _WithAdapter(nn.Module):
    """A linear layer with a bottleneck behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        output = super().forward(x)
        down, down_bias, up, up_bias = (self.get_parameter(f"adapter_{leaf}") for leaf in _LEAVES)
        # In the leaves' own type, like peft's layers: float32 beside frozen bfloat16 weights.
        hidden = F.gelu(F.linear(output.to(down.dtype), down, down_bias))
        return output + F.linear(hidden, up, up_bias).to(output.dtype)


@cache
def _class_with_adapter(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"{plain.__name__}WithAdapter", (_WithAdapter, plain), {})
