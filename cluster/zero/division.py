"""Division of a model's weights over the ranks while it is loaded, as ZeRO-3 divides them."""

from __future__ import annotations

import socket
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from adapeft.errors import AdapeftError
from adapeft.files.mapped import on_disk
from adapeft.sections.cluster import Cluster
from cluster.zero.settings import PERSISTENCE_THRESHOLD, zero_config


class ZeroDivision:
    """Implementation of ``adapeft.model.unloaded.divided.Division`` with ``deepspeed.zero.Init``.

    An engine at stage 3 takes over the parameters that were divided before, and divides those that were added since.

    Args:
        offload: ``cluster.offload``.
        folder: ``cluster.offload_folder``.

    Raises:
        AdapeftError: this machine does not have the folder.
    """

    def __init__(self, offload: str, folder: str | None) -> None:
        self._offload = offload
        self._folder = None if folder is None else Path(folder)
        self._first: nn.Parameter | None = None
        if self._folder is not None and not self._folder.is_dir():
            raise AdapeftError(
                f"cluster.offload_folder = {folder}: {socket.gethostname()} has no such folder. Create it on every "
                f"machine, on a fast local drive."
            )

    @property
    def reads(self) -> bool:
        """See ``Division.reads``."""
        return dist.get_rank() == 0

    def divide(self, parameter: nn.Parameter) -> None:
        """See ``Division.divide``."""
        self._divide(parameter)
        if self._folder is not None:
            part = parameter.ds_tensor  # type: ignore[attr-defined]
            try:
                part.data = on_disk(part.data, self._folder)
            except OSError as error:
                raise AdapeftError(
                    f"cluster.offload_folder = {self._folder}: {part.nbytes:,} bytes cannot be written on "
                    f"{socket.gethostname()} ({error.strerror}). Free space there, or name another folder."
                ) from error

    def _divide(self, parameter: nn.Parameter) -> None:
        if self._first is not None:
            self._first.convert_to_zero_parameters([parameter])  # type: ignore[attr-defined]
            return
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": parameter.dtype == torch.bfloat16},
            "zero_optimization": zero_config(3, PERSISTENCE_THRESHOLD, 1, self._offload),
        }
        deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=config)
        self._first = parameter


def division_of(cluster: Cluster) -> ZeroDivision | None:
    """Return the division of a run's weights; None below stage 3, where every rank holds them whole."""
    return ZeroDivision(cluster.offload, cluster.offload_folder) if cluster.zero_stage == 3 else None
