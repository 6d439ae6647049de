"""Resources of workers, and whether a machine or cluster has enough of them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from adapeft.errors import AdapeftError
from adapeft.memory.heap import RETURNED, TRIM
from adapeft.sections.cluster import Cluster

COMPACT = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""Tunables with which glibc merges small freed blocks with their neighbours at once.

PyTorch allocates aligned blocks, for which glibc (before 2.38) takes a larger one and frees the ends. While these are
in one of its caches of small blocks, the hole that such a block leaves is too small for the next of the same size. At
the peak of a training step a process holds 1299 instead of 1602 MiB (MiniLM, 32 x 64 tokens) and 2138 instead of 2524
(SmolLM2-135M, 8 x 128 tokens); see tests/benchmarks/results/memory.md.
"""
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(RETURNED), "MALLOC_TRIM_THRESHOLD_": str(TRIM)}
"""Variables with which glibc returns freed blocks of 4 MiB and more to the system at once, for ZeRO-3 on a CPU.

By default it keeps blocks of up to 32 MiB, and so holes between gathered weights. A threshold of 1 MiB takes 24 to 65 %
more time.
"""


FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""Variables with which oneDNN, which multiplies bfloat16 matrices on a CPU, keeps 128 kernels instead of 1024.

It makes one for every shape, and each length of a batch and each number of chosen rows of a matrix is another. In use
after the 1st and the 7th step of SmolLM2-135M, whose chosen elements are in blocks of 120 sizes, are 247 and 919 MiB,
and with these 246 and 298. They cost no time. The second is that of PyTorch's own cache in front of oneDNN's.
"""


def per_worker(cluster: Cluster) -> dict[str, float]:
    """Return the amount of each resource that one worker takes."""
    gpus: dict[str, float] = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return {"CPU": cluster.cpus_per_worker, **gpus}


def missing(cluster: Cluster, there: Mapping[str, float]) -> dict[str, float]:
    """Return the total amount that all workers need of each resource that is insufficient."""
    wanted = {name: cluster.workers * amount for name, amount in per_worker(cluster).items()}
    return {name: amount for name, amount in wanted.items() if there.get(name, 0) < amount}


def room_in(cluster: Cluster, there: Mapping[str, float], waited: float = 0.0) -> int:
    """Return the number of workers that the available resources allow, at most ``cluster.workers``.

    Args:
        cluster: number and resources of the workers.
        there: available amount of each resource.
        waited: seconds already waited for machines to join.

    Raises:
        AdapeftError: the resources do not suffice for the minimum number of workers.
    """
    if not missing(cluster, there):
        return cluster.workers
    room = min(int(there.get(name, 0) // amount) for name, amount in per_worker(cluster).items())
    if room >= cluster.fewest:
        return room
    lacking = missing(cluster.with_workers(cluster.fewest), there)
    lacks = " and ".join(f"{amount:g} {name}s ({there.get(name, 0):g} available)" for name, amount in lacking.items())
    key = "cluster.min_workers" if cluster.min_workers else "cluster.workers"
    after = f" after {waited:g} s" if waited else ""
    longer = ", or raise cluster.resource_timeout" if waited else ""
    raise AdapeftError(
        f"{key} = {cluster.fewest}: the cluster has too few resources{after}; required: {lacks}. Lower "
        f"{key}, cluster.cpus_per_worker or cluster.gpus_per_worker, or add machines{longer}."
    )


def environment_of(cluster: Cluster) -> dict[str, str]:
    """Return the environment variables of a worker; allocator settings in the environment of this process win."""
    environment = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker), "TOKENIZERS_PARALLELISM": "false"}
    if not cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
        # The last value of a tunable counts.
        own = os.environ.get("GLIBC_TUNABLES", "").removeprefix(COMPACT).removeprefix(":")
        environment["GLIBC_TUNABLES"] = f"{COMPACT}:{own}".removesuffix(":")
        defaults = FEW_KERNELS | RETURNING if cluster.zero_stage == 3 else FEW_KERNELS
        environment |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    return environment
