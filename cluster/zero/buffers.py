"""Synchronization of buffers that training changes, such as running statistics."""

from __future__ import annotations

from torch import nn

from adapeft.tune.attachment import attachment_of
from adapeft.tune.buffers import changed_buffers, set_buffers
from cluster.zero.engine import DistributedRanks


def share_buffers(model: nn.Module, ranks: DistributedRanks) -> None:
    """Broadcast the buffers of the first rank to all, as DistributedDataParallel does. Collective.

    The forward of each rank updates its buffers from its share of the batch; DeepSpeed does not synchronize them.
    """
    buffers = attachment_of(model).buffers
    if ranks.world_size > 1 and buffers:
        set_buffers(model, ranks.all_gather_object(changed_buffers(model, buffers))[0])
