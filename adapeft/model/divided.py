"""Detecting parameters that a trainer has partitioned over ranks, and gathering them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def is_divided(parameter: Tensor) -> str:
    """Return what has partitioned ``parameter``; empty if every rank holds all of it."""
    if isinstance(parameter, DTensor):
        return "a DTensor, as in FSDP2 and tensor parallelism"
    return "ZeRO-3" if hasattr(parameter, "ds_id") else ""


@torch.no_grad()
def full_value(parameter: Tensor) -> Tensor:
    """Return the full value of a parameter, in float32 if DeepSpeed steps a float32 copy of it. Collective.

    DeepSpeed is not imported: ZeRO adds the methods used here to the parameters themselves (see
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
    """Context in which the parameters of FullyShardedDataParallel are unflattened and gathered. Collective."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
    else:
        yield
