"""Conversion of a model without weights to fake tensors on a CPU, on which its forward and backward pass can run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapeft.model.unloaded.weightless import Weightless


def to_fake(model: nn.Module, dtype: torch.dtype, weightless: Weightless) -> None:
    """Move a model from the meta device to fake CPU tensors, all parameters in one dtype, as DeepSpeed casts them."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # otherwise it is tied
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fake = torch.empty_like(tensor, device="cpu", dtype=dtype if is_parameter else tensor.dtype)
                    if not is_parameter:
                        weightless.carry(tensor, fake)
                    made[id(tensor)] = tensor, nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                store[name] = made[id(tensor)][1]
