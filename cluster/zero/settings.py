"""Settings of DeepSpeed's ZeRO other than the stage; importing them does not import DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from adapeft.memory.estimate import Zero
from adapeft.sections.cluster import Cluster

PERSISTENCE_THRESHOLD = 1_000_000
"""Number of elements below which stage 3 keeps a parameter whole on every rank.

Gathering a small matrix for every forward costs more than the memory it frees: MiniLM on two CPU ranks spent 0.47 s of
a step's forward at DeepSpeed's default of 100,000 and 0.17 s at stage 2. All matrices of a 7 B model are larger.
"""
REDUCE_BUCKET = 500_000_000
"""Maximum number of gradient elements that are reduced at once.

DeepSpeed allocates a buffer of this size, 2 GiB, even for a subset of kilobytes, so engines set the number of trained
elements if that is smaller.
"""
LIVE = 100_000_000
"""Maximum number of elements that stage 3 keeps gathered, and the reuse distance within which they are kept.

At DeepSpeed's default of 1e9 a worker holds the whole of a smaller model: evaluating 1.1 B parameters in bfloat16 took
3.8 GB of each of two workers, and 2.1 GB at this value (results/divided.md).
"""


def zero_of(cluster: Cluster) -> Zero:
    """Return the ZeRO settings of a run, with the minimum number of workers."""
    # The memory of a worker without a GPU is that of its machine.
    offload = "none" if cluster.offload == "cpu" and not cluster.gpus_per_worker else cluster.offload
    on_cpu = not cluster.gpus_per_worker
    return Zero(cluster.zero_stage, cluster.fewest, PERSISTENCE_THRESHOLD, REDUCE_BUCKET, LIVE, offload, on_cpu)


def can_divide(quantization: str, zero_stage: int, workers: int) -> bool:
    """Return whether a stage can divide weights of this type: an 8-bit layer of bitsandbytes keeps a copy of them."""
    return not (quantization == "int8" and zero_stage == 3 and workers > 1)


def zero_config(stage: int, persistence_threshold: int, reduce_bucket: int, offload: str) -> Mapping[str, Any]:
    """Return the section ``zero_optimization`` of a DeepSpeed config; ``offload`` is the key of the run's config."""
    section = {
        "stage": stage,
        "reduce_bucket_size": reduce_bucket,
        "stage3_param_persistence_threshold": persistence_threshold,
        "stage3_max_live_parameters": LIVE,
        "stage3_max_reuse_distance": LIVE,
        # On a CPU one at a time: gathered together, weights lie in one block until the last of them is released.
        "stage3_allgather_sequential": not uses_cuda(),
        # DeepSpeed's linear for stage 3 replaces torch's everywhere, and runs at half its speed on a CPU.
        "memory_efficient_linear": False,
    }
    # Parts in mapped files are tensors of the CPU. DeepSpeed's own swapping to NVMe needs libaio.
    return section if offload == "none" else section | {"offload_param": {"device": "cpu"}}


def uses_cuda() -> bool:
    """Return whether the ranks compute on GPUs."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
