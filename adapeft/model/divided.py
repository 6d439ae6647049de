"""Parameters that a trainer divides over ranks: how to tell them, and how to read them whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def is_divided(parameter: Tensor) -> str:
    """What has divided ``parameter``; empty where each rank holds all of it."""
    if isinstance(parameter, DTensor):
        return "a DTensor, as FSDP2 and tensor parallelism make"
    return "ZeRO-3" if hasattr(parameter, "ds_id") else ""


@torch.no_grad()
def full_value(parameter: Tensor) -> Tensor:
    """A parameter whole, in float32 where DeepSpeed steps a float32 copy of it. Collective.

    DeepSpeed is not imported: its ZeRO puts the methods used here on the parameters themselves (see
    ``deepspeed/utils/tensor_fragment.py`` and ``deepspeed/runtime/zero/partition_parameters.py``).
    """
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "_z3_optimizer") and parameter.requires_grad:
        return parameter._z3_optimizer.get_full_hp_param(parameter)
    if hasattr(parameter, "_hp_mapping"):
        return parameter.get_full_hp_param()  # type: ignore[attr-defined]
    if hasattr(parameter, "ds_id") and parameter.ds_status.name == "NOT_AVAILABLE":  # type: ignore[attr-defined]
        parameter.all_gather(param_list=[parameter])  # type: ignore[attr-defined]
        value = parameter.detach().clone()
        parameter.partition(param_list=[parameter], has_been_updated=False)  # type: ignore[attr-defined]
        return value
    return parameter.detach()


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within it the parameters that FullyShardedDataParallel flattened and divided are whole again. Collective."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
    else:
        yield
