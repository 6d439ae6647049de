"""Detecting parameters that a trainer has partitioned over ranks, and gathering them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import FSDP_FLATTENED
from torch.distributed.tensor import DTensor


def is_divided(parameter: Tensor) -> str:
    """Return what has partitioned ``parameter``; empty if every rank holds all of it."""
    if isinstance(parameter, DTensor):
        return "a DTensor, as in FSDP2 and tensor parallelism"
    return "ZeRO-3" if hasattr(parameter, "ds_id") else ""


def is_flattened(parameter: Tensor) -> bool:
    """Whether FullyShardedDataParallel has made ``parameter`` a view of a flat one."""
    return bool(getattr(parameter, FSDP_FLATTENED, False))


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return the full shape of a parameter, also under ZeRO-3."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameter: Tensor, *, changes: bool = False) -> Iterator[None]:
    """Context in which ``parameter`` is whole, if ZeRO-3 has divided it. Collective.

    Args:
        parameter: parameter of a model.
        changes: whether the block changes its values, on all ranks in the same way; otherwise changes are lost.
    """
    if not is_partitioned(parameter):
        yield
        return
    parameter.all_gather(param_list=[parameter])  # type: ignore[attr-defined]
    try:
        yield
    finally:
        parameter.partition(param_list=[parameter], has_been_updated=changes)  # type: ignore[attr-defined]


def own_part(parameter: Tensor) -> Tensor:
    """Return a copy of what this process holds of a parameter, float32 on the CPU: flat if ZeRO-3 has divided it."""
    if not is_partitioned(parameter):
        return parameter.detach().to("cpu", torch.float32, copy=True)
    return parameter.ds_tensor.to("cpu", torch.float32, copy=True)  # type: ignore[attr-defined]


def whole_of(part: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole value of which every rank has the ``own_part``, float32 on the CPU. Collective."""
    if not hasattr(parameter, "ds_id") or tuple(part.shape) == shape_of(parameter):
        return part
    group, device = parameter.ds_process_group, parameter.device  # type: ignore[attr-defined]
    parts = [torch.empty(len(part), device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.to(device), group)
    shape = shape_of(parameter)
    return torch.cat(parts)[: torch.Size(shape).numel()].view(shape).cpu()


def picked(parameter: Tensor, places: Tensor) -> Tensor:
    """Return the elements at flat ``places``, as bfloat16 on the CPU, of a parameter divided by ZeRO-3. Collective."""
    part = parameter.ds_tensor  # type: ignore[attr-defined]
    start = dist.get_rank(parameter.ds_process_group) * len(part)  # type: ignore[attr-defined]
    own = (places >= start) & (places < start + len(part))
    bits = torch.zeros(len(places), dtype=torch.int32)
    found = part[(places[own] - start).to(part.device)].to(torch.bfloat16).cpu()
    # As integers, because a sum with zeros would change the sign of a negative zero.
    bits[own] = found.view(torch.int16).int()
    summed = bits.to(parameter.device)
    dist.all_reduce(summed, group=parameter.ds_process_group)  # type: ignore[attr-defined]
    return summed.cpu().short().view(torch.bfloat16)


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
    if is_partitioned(parameter):
        with gathered(parameter):
            return parameter.detach().clone()
    return parameter.detach()


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Context in which the parameters of FullyShardedDataParallel are unflattened and gathered. Collective."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
    else:
        yield


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has divided ``parameter``, and this process holds only its part at present."""
    return hasattr(parameter, "ds_id") and parameter.ds_status.name == "NOT_AVAILABLE"  # type: ignore[attr-defined]
