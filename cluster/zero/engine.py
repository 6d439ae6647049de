"""Setup of DeepSpeed: the process group, and engines for training and for passes without an optimizer."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

# DeepSpeed compiles a small operation with ninja, which is next to the interpreter if no environment is activated.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])

import deepspeed

from adapeft.files.artifact import replacing
from adapeft.model.divided import is_divided, shape_of
from adapeft.tune.parameter_groups import parameter_groups
from cluster.zero.compiled import load_compiled
from cluster.zero.optimizer import SkippableAdamW
from cluster.zero.settings import PERSISTENCE_THRESHOLD, REDUCE_BUCKET, uses_cuda, zero_config

_CHUNK = 2**26
"""Bytes of a file that are sent at once."""


class DistributedRanks:
    """Implementation of ``adapeft.ranks.Ranks`` with ``torch.distributed``."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        # NCCL sends only GPU tensors, gloo CPU tensors.
        self.device = torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over the ranks in place and return it."""
        moved = tensor.to(self.device)
        dist.all_reduce(moved)
        return tensor.copy_(moved)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the 1-D tensors of all ranks, by rank; lengths may differ."""
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = len(tensor)
        self.all_reduce(lengths)
        longest = int(lengths.max())
        padded = torch.zeros(longest, dtype=tensor.dtype, device=self.device)
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded)
        return [piece[:length].to(tensor.device) for piece, length in zip(gathered, lengths.tolist(), strict=True)]

    def gather_files(self, mine: Path | None, place: Callable[[int], Path]) -> None:
        """Copy the file ``mine`` of each rank, unless None, to ``place(rank)`` on the first rank's machine."""
        sizes = self.all_gather(torch.tensor([-1 if mine is None else mine.stat().st_size]))
        for rank, size in enumerate(map(int, sizes)):
            if size >= 0 and self.rank == rank:
                assert mine is not None
                with mine.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        dist.send(torch.frombuffer(bytearray(chunk), dtype=torch.uint8).to(self.device), 0)
            elif size >= 0 and self.rank == 0:
                with replacing(place(rank)) as path, path.open("wb") as file:
                    for start in range(0, size, _CHUNK):
                        piece = torch.empty(min(_CHUNK, size - start), dtype=torch.uint8, device=self.device)
                        dist.recv(piece, rank)
                        file.write(piece.cpu().numpy().tobytes())

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the picklable ``value`` of every rank, by rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered


def join() -> DistributedRanks:
    """Join the process group that the launcher described in the environment variables, as torchrun does."""
    if uses_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    load_compiled()
    deepspeed.init_distributed(dist_backend="nccl" if uses_cuda() else "gloo", verbose=False)
    return DistributedRanks()


def training_engine(
    model: nn.Module,
    *,
    zero_stage: int,
    num_micro: int,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float | None,
    schedule: Callable[[torch.optim.Optimizer], LRScheduler],
    head_learning_rate: float | None = None,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
    offload: str = "none",
) -> deepspeed.DeepSpeedEngine:
    """Return an engine that trains the attached parameters of ``model``; see ``parameter_groups``."""
    _complete(model)
    # Some schedules of transformers read the optimizer's default instead of the rates of its groups.
    optimizer = SkippableAdamW(
        parameter_groups(model, learning_rate, weight_decay, head_learning_rate), lr=learning_rate
    )
    num_trained = sum(math.prod(shape_of(parameter)) for parameter in model.parameters() if parameter.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule(optimizer),
        config={
            # The engine gets losses, not batches: only the accumulation matters.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": num_micro,
            "gradient_clipping": max_grad_norm or 0.0,
            "bf16": {"enabled": _is_bf16(model)},
            "zero_optimization": zero_config(
                zero_stage, persistence_threshold, min(num_trained, REDUCE_BUCKET), offload
            ),
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        },
    )
    return engine


def set_head_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Give the new head of an engine's model another peak learning rate, before the first step."""
    schedule = engine.lr_scheduler
    for index, group in enumerate(schedule.optimizer.param_groups):
        if group.get("is_head"):
            group["lr"] *= rate / schedule.base_lrs[index]
            group["initial_lr"] = schedule.base_lrs[index] = rate


def head_rate_of(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Return the peak learning rate of the new head of an engine's model; None if it has none."""
    groups = engine.lr_scheduler.optimizer.param_groups
    return next((float(group["initial_lr"]) for group in groups if group.get("is_head")), None)


def inference_engine(
    model: nn.Module, zero_stage: int, offload: str = "none", persistence_threshold: int = PERSISTENCE_THRESHOLD
) -> nn.Module:
    """Return the model without an optimizer: divided over the ranks at stage 3, otherwise whole on each rank."""
    model.requires_grad_(False)
    if zero_stage < 3:
        return model.to(DistributedRanks().device)
    _complete(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero_config(3, persistence_threshold, 1, offload),
        "bf16": {"enabled": _is_bf16(model)},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def release(engine: nn.Module) -> None:
    """Free the weights of an engine, whose model is unusable afterwards.

    DeepSpeed keeps references to every model that stage 3 has divided (a list of modules, caches of methods), so the
    next stage of a run would start with its memory.
    """
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        return
    engine.destroy()
    for tensor in (*engine.module.parameters(), *engine.module.buffers()):
        if is_divided(tensor):
            tensor.ds_tensor.data = torch.empty(0, dtype=tensor.dtype)
        tensor.data = torch.empty(0, dtype=tensor.dtype)


def backward_of_sum(engine: deepspeed.DeepSpeedEngine, part: Tensor) -> None:
    """Run backward on one part of a loss, which is the sum of its parts over ranks and micro-batches."""
    # DeepSpeed averages over ranks and micro-batches.
    engine.backward(part * (dist.get_world_size() * engine.gradient_accumulation_steps()))


def _complete(model: nn.Module) -> None:
    """Do what DeepSpeed leaves out for a model that was divided while it was loaded: move buffers, cast new leaves."""
    if not any(is_divided(parameter) for parameter in model.parameters()):
        return
    device = DistributedRanks().device
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    if _is_bf16(model):
        for parameter in model.parameters():
            if not is_divided(parameter):
                parameter.data = parameter.data.bfloat16()


def _is_bf16(model: nn.Module) -> bool:
    return next(model.parameters()).dtype == torch.bfloat16


def runs_in_step(model: nn.Module) -> bool:
    """Return whether a forward pass is a collective: the engine gathers its weights from several ranks."""
    return (
        isinstance(model, deepspeed.DeepSpeedEngine)
        and model.zero_optimization_stage() == 3
        and dist.get_world_size() > 1
    )
