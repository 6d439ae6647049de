"""Estimates of the memory on each device and of the traffic of measuring and training, before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from adapeft.choose.knapsack import parts_of
from adapeft.config.config import Config
from adapeft.data.batches import num_micro_batches
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.low_rank.windows import Windows, num_seen
from adapeft.measure.mode import set_measuring_mode
from adapeft.measure.statistics import Statistics
from adapeft.measure.unreached import unreached_without_weights
from adapeft.memory.activations import Counted, count_pass, repeated_token
from adapeft.memory.estimate import FLOAT32, Load, Memory, Pass, Zero, memory, offloaded, share
from adapeft.memory.heap import LARGEST_THRESHOLD, RETURNED
from adapeft.memory.limit import MemoryLimit
from adapeft.methods.registry import METHODS, Plan, ValuedMethod, get_method
from adapeft.model.activations import recompute_activations
from adapeft.model.checkpoint.checkpoint import unmapped_bytes
from adapeft.model.checkpoint.files import has_weights
from adapeft.model.quantization import stored_quantization
from adapeft.model.unloaded.unloaded import NeedsLoadingError, OnlyWholeError, build_unloaded, open_unloaded
from adapeft.model.unloaded.weightless import Weightless
from adapeft.ranks import OneRank
from adapeft.subset.subset import Subset
from adapeft.tasks.losses.objective import Objective
from adapeft.tasks.registry import TASKS
from adapeft.tune.attach import attach
from cluster.inspection.inspection import Inspection
from cluster.output.folder import RunFolder
from cluster.units import size_of
from cluster.zero.settings import can_divide, zero_of

PROCESS = {"local": 620 * 2**20, "ray": 760 * 2**20}
"""Bytes of a worker with its libraries and a small data set, on a CPU, by launcher.

Measured: 450 to 480 MiB of its own and 80 to 190 of mapped libraries in a fork, 530 and 230 in a worker of Ray. On a
GPU it is host memory, and CUDA's own context is not counted.
"""
GRID = (1, 2, 4, 8)
"""Numbers of workers that a run is estimated for, in addition to its own."""


@dataclass(frozen=True)
class Estimate:
    """Estimates for one run.

    Attributes:
        config: config of the run.
        model_config: config of its model.
        groups: candidates.
        subset: subset to train, or a random one in its place if nothing is measured yet.
        is_measured: whether nothing is left to be measured.
        num_tokens: tokens per example.
        objective: objective of the task.
    """

    config: Config
    model_config: PretrainedConfig
    groups: Groups
    subset: Subset
    is_measured: bool
    num_tokens: int
    objective: Objective

    def loads(self, zero: Zero) -> dict[str, Load]:
        """Return the loads of loading, of measuring on the engines of ``zero`` or choosing, and of training.

        Loading is left out where no worker holds more while loading than later. Nothing is measured or chosen if the
        choice or its statistics exist.
        """
        loads = {}
        if zero.stage == 3 and self.loads_whole is not None:
            loads["loading"] = self.loading(zero)
        if not self.is_measured:
            measures = get_method(self.config.select.method).measures_loss
            if measures or self.needs_loading is not None:
                loads["measuring"] = self.measuring(zero)
            else:
                loads["choosing"] = self.choosing()
        return {**loads, "training": self.training(zero)}

    @cached_property
    def needs_loading(self) -> str | None:
        """Reason why a method that measures nothing still needs the loaded model to choose; None if it does not."""
        try:
            structure, weightless = self._unloaded()
            set_measuring_mode(structure)
            batch = repeated_token(structure.config, self.objective, 1, self.num_tokens)
            unreached_without_weights(structure, weightless, self.groups, [batch], self.objective)
        except NeedsLoadingError as error:
            return str(error)
        return None

    @cached_property
    def loads_whole(self) -> str | None:
        """Reason why at stage 3 each worker holds all weights in its machine's memory while it loads them, or None."""
        if self.config.cluster.gpus_per_worker and stored_quantization(self.model_config):
            return None  # bitsandbytes quantizes on the GPU
        try:
            self._unloaded()
        except OnlyWholeError as error:
            return str(error)
        except NeedsLoadingError:  # loading fails, or reads the files one tensor at a time
            pass
        return None

    def _unloaded(self) -> tuple[PreTrainedModel, Weightless]:
        """Return the structure of the base; raises what ``open_unloaded`` raises if there are weights."""
        model = self.config.model
        if self._weights is not None:
            base = open_unloaded(model, self.model_config, self.config.select.always_train)
            return base.structure, base.weightless
        return build_unloaded(model, self.model_config)  # on the hub, or only a config

    @property
    def _weights(self) -> Path | None:
        """Folder of the base's weights; None if it is on the hub, or only a config."""
        folder = Path(self.config.model.name)
        return folder if folder.is_dir() and has_weights(folder) else None

    def loading(self, zero: Zero) -> Load:
        """Return the load of a worker that loads the whole base before it is divided, in the memory of its machine."""
        training = self.training(zero)
        elements = sum(training.sizes)
        # All weights, and a copy of the one that is being divided.
        whole = (elements + max(training.sizes)) * self._element_bytes + training.packed
        pickled = 0 if self._weights is None else unmapped_bytes(self._weights, self.config.model.name)
        if round(pickled / elements) not in (0, self._element_bytes):  # they are held until all are cast
            whole = max(whole, pickled + elements * self._element_bytes)
        return Load(
            sizes=(),
            element_bytes=self._element_bytes,
            num_trained=0,
            num_stepped=0,
            passes=Pass(0, 0),
            whole=whole,
            process=PROCESS[self.config.cluster.launched_by(os.environ.get("RAY_ADDRESS"))],
        )

    def choosing(self) -> Load:
        """Return the load of a choice that reads the checkpoint in the launching process, for a method without loss."""
        method = get_method(self.config.select.method)
        largest = max(info.count for info in self.groups.parameters)
        # A tensor, its float32 copy and its scores.
        scores = 3 * FLOAT32 * largest if method.scored is not None else 0
        return Load(
            sizes=(largest,),
            element_bytes=self._element_bytes,
            num_trained=0,
            num_stepped=0,
            passes=Pass(0, 0),
            statistics=scores + method.drawing_bytes(self.groups, self.subset.count),
            process=PROCESS["local"],
        )

    def measuring(self, zero: Zero) -> Load:
        """Return the load of measuring."""
        settings = self.config.select
        method = get_method(settings.method)
        batch_size = 1 if method.measures_examples else settings.batch_size
        counted, num_micro = self._counted("measuring", batch_size, settings.micro_batch_size, zero.workers)
        if rank := method.window_rank(self.groups, settings):
            candidates = num_seen(self.groups, rank)
            # Every worker has the windows, the sums over half A and all gradients of a batch of leaves; for single
            # elements, products of two factors per side, of the direction and of half B's gradient.
            copies = 6 if self.groups.granularity == "element" else 4
            statistics = copies * FLOAT32 * candidates if method.measures_loss else 0
        else:
            candidates = int(self.groups.counts.sum())
            statistics = share(method.statistics_bytes(settings, num_micro) * candidates, zero)
        always = counted.num_trained - candidates
        return Load(
            sizes=counted.sizes,
            element_bytes=self._element_bytes,
            num_trained=0,
            num_stepped=0,
            # The pass frees each gradient; a bound includes the largest of them.
            passes=Pass(counted.passes.activations, counted.passes.activations),
            packed=counted.packed,
            num_micro=num_micro,
            num_measured=counted.num_trained,
            num_warmed=always,
            statistics=statistics,
            process=self._process,
            **self._kept(counted, zero),
            unknown=counted.unknown,
        )

    def training(self, zero: Zero) -> Load:
        """Return the load of training the subset."""
        config = self.config.train
        counted, num_micro = self._counted("training", config.batch_size, config.micro_batch_size, zero.workers)
        whole = sum(part.count for part in self.subset.parts.values() if part.trains_in_place)
        return Load(
            sizes=counted.sizes,
            element_bytes=self._element_bytes,
            num_trained=counted.num_trained,
            num_stepped=counted.num_trained,
            passes=counted.passes,
            packed=counted.packed,
            num_micro=num_micro,
            base=0 if self.config.cluster.gpus_per_worker else FLOAT32 * whole,
            process=self._process,
            **self._kept(counted, zero),
            unknown=counted.unknown,
        )

    def memory(self, zero: Zero) -> dict[str, Memory]:
        """Return the bytes on a device by stage of the run."""
        return {name: memory(load, zero) for name, load in self.loads(zero).items()}

    def grid(self, zero: Zero) -> dict[tuple[int, int], dict[str, int]]:
        """Return (ZeRO stage, workers) → bytes on a device by stage of the run.

        For every ZeRO stage, 1 to 8 workers, and the numbers of workers that the run may have, without what a run
        would refuse, and without what is held in the memory of the machine next to GPUs.
        """
        numbers = sorted({*GRID, zero.workers, self.config.cluster.workers})
        quantization = stored_quantization(self.model_config)
        zeros = [
            replace(zero, stage=stage, workers=workers)
            for stage in range(4)
            for workers in numbers
            if can_divide(quantization, stage, workers)
        ]
        return {
            (z.stage, z.workers): {
                name: held.total
                for name, held in self.memory(z).items()
                if not (name == "loading" and self.config.cluster.gpus_per_worker)
            }
            for z in zeros
        }

    @property
    def _element_bytes(self) -> int:
        return getattr(torch, self.config.model.dtype).itemsize

    @property
    def _process(self) -> int:
        cluster = self.config.cluster
        return 0 if cluster.gpus_per_worker else PROCESS[cluster.launched_by(os.environ.get("RAY_ADDRESS"))]

    def _kept(self, counted: Counted, zero: Zero) -> dict[str, int]:
        """Return what the allocator keeps, ``freed`` and ``heap`` of a load."""
        if self.config.cluster.gpus_per_worker:
            return {}
        held = counted.held[RETURNED if zero.stage == 3 else LARGEST_THRESHOLD]
        return {"freed": max(0, held.most - counted.passes.with_gradients), "heap": held.in_heap}

    def _counted(self, stage: str, batch_size: int, micro_batch_size: int | None, workers: int) -> tuple[Counted, int]:
        num_micro = num_micro_batches(batch_size, workers, micro_batch_size)
        largest = math.ceil(math.ceil(batch_size / workers) / num_micro)
        num_tokens = self.num_tokens
        if (length := self.config.data.packed_length) is not None:
            # Packed rows hold at most as many tokens as padded ones, in fewer and longer rows.
            num_tokens = min(length, largest * self.num_tokens)
            largest = math.ceil(largest * self.num_tokens / num_tokens)
        return self._count(stage, largest, num_tokens), num_micro

    @cached_property
    def _count(self) -> Callable[[str, int, int], Counted]:
        model = self.config.model
        on_gpu = self.config.cluster.gpus_per_worker > 0
        model_config = _without_dropout(self.model_config) if on_gpu else self.model_config

        @cache
        def count(stage: str, num_examples: int, num_tokens: int) -> Counted:
            return count_pass(
                model_config,
                model.task,
                partial(_measured, self.groups, self.config)
                if stage == "measuring"
                else partial(_trained, self.subset, self.config),
                self.objective,
                num_examples=num_examples,
                num_tokens=num_tokens,
                dtype=getattr(torch, model.dtype),
                thresholds=() if on_gpu else (LARGEST_THRESHOLD, RETURNED),
                trust_remote_code=model.trust_remote_code,
            )

        return count


def remarks(estimate: Estimate, zero: Zero) -> list[str]:
    """Return what the figures do not say: bounds in place of uncounted activations, and where a choice is made."""
    loads = estimate.loads(zero)
    lines = [
        f"{stage}: its activations cannot be counted without weights ({load.unknown}); from their shapes they take at "
        f"most {size_of(load.passes.activations)} on a device"
        for stage, load in loads.items()
        if load.unknown is not None
    ]
    if zero.offload != "none":
        most = max(offloaded(load, zero) for load in loads.values())
        place = "its machine's memory" if zero.offload == "cpu" else estimate.config.cluster.offload_folder
        lines.append(f"cluster.offload = {zero.offload}: each worker keeps {size_of(most)} of weights in {place}")
    if "loading" in loads:
        lines.append(f"loading: every worker holds the whole base in its machine's memory ({estimate.loads_whole})")
    if "choosing" in loads:
        lines.append("choosing: in the launching process alone, in the memory of its machine")
    elif "measuring" in loads and not get_method(estimate.config.select.method).measures_loss:
        lines.append(f"measuring: {estimate.config.select.method} needs the loaded model ({estimate.needs_loading})")
    return lines


def estimate_of(inspection: Inspection) -> Estimate:
    """Return the estimate of an inspected run; loads nothing except the subset, if there is one."""
    config = inspection.config
    select, output = config.select, RunFolder.of(config).subset
    chosen = config.train.subset or (str(output) if output.is_file() else None)
    groups = inspection.groups
    if chosen is not None:
        subset = Subset.load(chosen)
    else:
        method = get_method(select.method)
        # Memory does not depend on which groups have the largest values, except for the number of layers they are in.
        stand_in = METHODS["random"] if isinstance(method, ValuedMethod) else method
        plan = Plan(inspection.budget, reach=1.0, seed=config.seed, settings=select)
        subset = stand_in.choose(groups, Statistics(groups, {}), plan, OneRank()).of_model(
            groups.always_train, groups.new
        )
    objective = TASKS[config.model.task].objective(inspection.description)
    is_measured = chosen is not None or select.statistics is not None
    return Estimate(config, inspection.model_config, groups, subset, is_measured, inspection.num_tokens, objective)


def limit_of(
    config: Config, model_config: PretrainedConfig, groups: Groups, num_tokens: int, objective: Objective
) -> MemoryLimit | None:
    """Return the budget in bytes if the config has one, else None.

    Raises:
        AdapeftError: the budget leaves no memory for the subset.
    """
    limit = config.select.memory_per_device
    if limit is None:
        return None
    zero = zero_of(config.cluster)
    most = _most_at_work(groups)
    load = Estimate(config, model_config, groups, most, True, num_tokens, objective).training(zero)
    always = load.num_trained - most.count
    sizes = list(load.sizes)
    for part in most.parts.values():
        if part.num_indices:
            sizes.remove(part.count)
    # Activations are the most that any subset can keep; everything else is counted without a subset.
    fixed = replace(load, sizes=sizes, num_trained=always, num_stepped=always, num_micro=2, base=0)
    try:
        return MemoryLimit.of(limit, fixed, zero, keeps_base=not config.cluster.gpus_per_worker)
    except AdapeftError as error:
        if load.unknown is None:
            raise
        raise AdapeftError(
            f"{error} The activations are only a wide bound, because they cannot be counted without weights "
            f"({load.unknown}). Give select.budget instead."
        ) from error


def _most_at_work(groups: Groups) -> Subset:
    """Return all groups; for single elements one per tensor, as their number does not change the activations."""
    if groups.granularity == "element":
        parts = {info.name: groups.part(index, torch.zeros(1).long()) for index, info in enumerate(groups.parameters)}
    else:
        parts = parts_of(groups, np.ones(groups.num_groups, dtype=bool))
    return Subset(parts, groups.always_train, groups.new)


def _measured(groups: Groups, config: Config, model: PreTrainedModel) -> None:
    rank = get_method(config.select.method).window_rank(groups, config.select)
    names = Windows(model, groups, rank, config.seed).names if rank else [info.name for info in groups.parameters]
    wanted = {*names, *groups.always_train}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            parameter.register_post_accumulate_grad_hook(_free)
    if config.model.gradient_checkpointing:
        recompute_activations(model)
    set_measuring_mode(model)


def _free(parameter: torch.Tensor) -> None:
    """Count a gradient as measuring holds it: until the next one, next to a float32 copy."""
    assert parameter.grad is not None
    parameter.grad.float()
    parameter.grad = None


def _trained(subset: Subset, config: Config, model: PreTrainedModel) -> None:
    attach(model, subset)
    if config.model.gradient_checkpointing:
        recompute_activations(model)
    model.train()


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config without dropout, because attention on a GPU does not store the probabilities as a CPU does."""
    off = {name: 0.0 for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float)}
    return type(config).from_dict({**config.to_dict(), **off})
