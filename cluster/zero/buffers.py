"""Buffers that training changes, such as running statistics, on several ranks."""

from __future__ import annotations

from torch import nn

from adapeft.tune.attachment import attachment_of
from adapeft.tune.buffers import changed_buffers, set_buffers
from cluster.zero.engine import DistributedRanks


def share_buffers(model: nn.Module, ranks: DistributedRanks) -> None:
    """Gives every rank the first one's buffers, as DistributedDataParallel does. Collective.

    Each rank's forward changes its own, by its own share of the batch; DeepSpeed leaves them apart.
    """
    buffers = attachment_of(model).buffers
    if ranks.world_size > 1 and buffers:
        set_buffers(model, ranks.all_gather_object(changed_buffers(model, buffers))[0])
