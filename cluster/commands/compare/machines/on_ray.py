"""Runs of a comparison on the machines of a Ray cluster, or on a local Ray that ends with the comparison.

A run whose workers fit on one machine is a Ray task that holds the resources of all of them, and starts them there with
the local launcher. So Ray places runs where there is room, several at once, and no run waits for workers while it
holds a place for others.

A run whose workers fit on no single machine is a task without resources, and starts Ray workers of its own. These can
neither deadlock: Ray Train reserves the resources of all workers of a run at once or none. No more such runs are
started than the cluster has room for, since one that waits for its workers takes memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from adapeft.config.config import Config
from adapeft.sections.cluster import Cluster
from cluster.commands.compare.machines.local import Machines
from cluster.commands.compare.machines.task import command_on_machine
from cluster.launch.ray.connection import connect, room_for
from cluster.launch.resources import per_worker
from cluster.output.identity import job_metadata, run_id


class RayMachines(Machines):
    """The machines of a Ray cluster, to which this process is connected.

    Args:
        cluster: number and resources of the workers of every run.
        at_once: largest number of runs at once; None: as many as there is room for.

    Attributes:
        resources: what Ray reserves for the process of a run.
        retries: how often Ray repeats what was lost with its machine.
        environment: environment variables that this process needs in addition to those of its machine.

    Raises:
        AdapeftError: the cluster has too few resources for one run.
    """

    def __init__(self, cluster: Cluster, at_once: int | None) -> None:
        super().__init__(at_once)
        present = cluster.with_workers(room_for(cluster))
        whole = {name: present.workers * amount for name, amount in per_worker(present).items()}
        self.environment: dict[str, str] = {}
        if any(_has(node["Resources"], whole) for node in ray.nodes() if node["Alive"]):
            self._cluster = present.model_copy(update={"launcher": "local"})
            self.resources: dict[str, float] = whole
        else:
            self._cluster = present.model_copy(update={"launcher": "ray"})
            # One byte: Tune accepts no trial without resources, and a CPU less could leave a run without its last one.
            self.resources = {"memory": 1}
            self.environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
            total = ray.cluster_resources()
            room = min(int(total.get(name, 0) // amount) for name, amount in whole.items())
            self.at_once = min(room, at_once or room)
        self.retries = cluster.max_failures

    def placed(self, config: Config) -> Config:
        return config.model_copy(update={"cluster": self._cluster})

    def execute(self, command: str, settings: Path, log: Path) -> int:
        # max_calls: otherwise the process that has waited for a run would be kept, and with it what it has imported.
        task: Any = ray.remote(max_calls=1)(command_on_machine).options(
            num_cpus=self.resources.get("CPU", 0),
            num_gpus=self.resources.get("GPU", 0),
            memory=self.resources.get("memory"),
            max_retries=self.retries,
            name=f"{command} {settings.stem}",
        )
        try:
            return ray.get(task.remote(command, str(settings), str(log), self.environment))
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            lines = str(cause).strip().splitlines()
            with log.open("a", encoding="utf-8") as file:
                file.write(f"\nfailed {lines[0] if lines else type(cause).__name__}\n")
            return 1


@contextmanager
def ray_machines(config: Config, at_once: int | None) -> Iterator[RayMachines]:
    """Connect to the cluster at ``RAY_ADDRESS``, or start a local one; yield its machines and disconnect."""
    connect(config.cluster, job_metadata(config, run_id(config)))
    try:
        yield RayMachines(config.cluster, at_once)
    finally:
        ray.shutdown()


def _has(there: dict[str, float], wanted: dict[str, float]) -> bool:
    return all(there.get(name, 0) >= amount for name, amount in wanted.items())
