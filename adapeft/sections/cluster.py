"""The config's ``cluster`` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from adapeft.sections.section import Harmless, Section


class Cluster(Section):
    """The machines that measure and train."""

    workers: Harmless[PositiveInt] = Field(
        default=1, description="processes that share the work, each with a part of the model"
    )
    launcher: Harmless[Literal["auto", "local", "ray"]] = Field(
        default="auto",
        description="what starts them: local, processes of this machine without Ray; ray, the cluster of RAY_ADDRESS, "
        "else one of its own; auto: local for one worker where RAY_ADDRESS is not set, otherwise ray",
    )
    min_workers: Harmless[PositiveInt | None] = Field(
        default=None,
        description="start with fewer workers, but so many at least, when resource_timeout is over; null: with all",
    )
    cpus_per_worker: Harmless[PositiveInt] = Field(default=1, description="processor cores reserved for a worker")
    gpus_per_worker: Harmless[int] = Field(
        default=0, ge=0, le=1, description="1 to train on GPUs: a worker drives one device"
    )
    zero_stage: Harmless[int] = Field(
        default=3, ge=0, le=3, description="what DeepSpeed splits: 1 optimizer, 2 + gradients, 3 + weights"
    )
    resource_timeout: Harmless[PositiveFloat] = Field(
        default=30.0, description="seconds to wait for missing workers", allow_inf_nan=False
    )
    collective_timeout: Harmless[PositiveInt] = Field(
        default=1800, description="seconds a worker waits for the others before the run ends with an error"
    )
    max_failures: Harmless[NonNegativeInt] = Field(
        default=0, description="times that a stage goes on with new workers after some were lost or failed, as in Ray"
    )
    save_interval: Harmless[NonNegativeFloat] = Field(
        default=300.0,
        description="seconds of measuring after which its sums are saved for an interrupted run; 0: never",
        allow_inf_nan=False,
    )

    @model_validator(mode="after")
    def _a_range(self) -> Cluster:
        if self.fewest > self.workers:
            raise ValueError(f"min_workers = {self.min_workers}: is more than workers = {self.workers}; lower it")
        return self

    @property
    def fewest(self) -> int:
        """Workers that the run starts with at least."""
        return self.min_workers or self.workers

    def with_workers(self, workers: int) -> Cluster:
        """The same with exactly so many."""
        return self.model_copy(update={"workers": workers, "min_workers": None})
