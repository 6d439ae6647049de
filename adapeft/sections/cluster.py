"""The config's ``cluster`` section."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from adapeft.sections.section import Harmless, Section


class Cluster(Section):
    """The machines that measure and train."""

    workers: Harmless[PositiveInt] = Field(
        default=1, description="number of processes that share the work, each with a part of the model"
    )
    launcher: Harmless[Literal["auto", "local", "ray"]] = Field(
        default="auto",
        description="what starts the workers; local: processes on this machine, without Ray; ray: the cluster at "
        "RAY_ADDRESS, or a new one on this machine; auto: local for one worker if RAY_ADDRESS is not set, else ray",
    )
    min_workers: Harmless[PositiveInt | None] = Field(
        default=None,
        description="minimum number of workers to start with once resource_timeout expires; null: all",
    )
    cpus_per_worker: Harmless[PositiveInt] = Field(default=1, description="CPU cores reserved for each worker")
    gpus_per_worker: Harmless[int] = Field(default=0, ge=0, le=1, description="1 to train on GPUs, one per worker")
    zero_stage: Harmless[int] = Field(
        default=3,
        ge=0,
        le=3,
        description="ZeRO stage of DeepSpeed: 1 partitions optimizer states, 2 also gradients, 3 also weights",
    )
    offload: Harmless[Literal["none", "cpu", "nvme"]] = Field(
        default="none",
        description="where the weights are that are not in use, with zero_stage = 3: none: on the device that "
        "computes; cpu: in the memory of its machine; nvme: in files of offload_folder, which are mapped to memory",
    )
    offload_folder: Harmless[str | None] = Field(
        default=None, description="folder on a fast local drive of every machine, for offload = nvme; an absolute path"
    )
    resource_timeout: Harmless[PositiveFloat] = Field(
        default=30.0, description="seconds to wait for missing workers", allow_inf_nan=False
    )
    collective_timeout: Harmless[PositiveInt] = Field(
        default=1800, description="seconds that a worker waits for the others before the run fails"
    )
    max_failures: Harmless[NonNegativeInt] = Field(
        default=0, description="how often a stage resumes with new workers after some were lost or failed, as in Ray"
    )
    save_interval: Harmless[NonNegativeFloat] = Field(
        default=300.0,
        description="seconds between saves of the measured sums, from which an interrupted run resumes; 0: never save",
        allow_inf_nan=False,
    )

    @model_validator(mode="after")
    def _a_range(self) -> Cluster:
        if self.fewest > self.workers:
            raise ValueError(f"min_workers = {self.min_workers}: is more than workers = {self.workers}; lower it")
        return self

    @model_validator(mode="after")
    def _offloads_with_stage_3(self) -> Cluster:
        if self.offload != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload = {self.offload}: needs zero_stage = 3, which divides weights, but it is {self.zero_stage}; "
                f"set zero_stage: 3, or offload: none"
            )
        return self

    @model_validator(mode="after")
    def _a_folder_for_nvme(self) -> Cluster:
        if self.offload == "nvme" and self.offload_folder is None:
            raise ValueError("offload = nvme: needs offload_folder, a folder on a fast local drive of every machine")
        if self.offload_folder is not None and self.offload != "nvme":
            raise ValueError(
                f"offload_folder = {self.offload_folder}: is used only with offload = nvme, but it is {self.offload}; "
                f"leave it out, or set offload: nvme"
            )
        if self.offload_folder is not None and not Path(self.offload_folder).is_absolute():
            raise ValueError(f"offload_folder = {self.offload_folder}: should be an absolute path")
        return self

    @property
    def fewest(self) -> int:
        """Minimum number of workers to start with."""
        return self.min_workers or self.workers

    def launched_by(self, ray_address: str | None) -> str:
        """Return what ``launcher`` means, ``local`` or ``ray``, where RAY_ADDRESS has this value; None if not set."""
        if self.launcher != "auto":
            return self.launcher
        return "local" if self.workers == 1 and ray_address is None else "ray"

    def with_workers(self, workers: int) -> Cluster:
        """Return a copy with exactly ``workers`` workers."""
        return self.model_copy(update={"workers": workers, "min_workers": None})
