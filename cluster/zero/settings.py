"""Settings of DeepSpeed's ZeRO other than the stage; importing them does not import DeepSpeed."""

from __future__ import annotations

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
LIVE = 1_000_000_000
"""Maximum number of elements that stage 3 keeps gathered, and the reuse distance within which they are kept."""


def zero_of(cluster: Cluster) -> Zero:
    """Return the ZeRO settings of a run, with the minimum number of workers."""
    return Zero(cluster.zero_stage, cluster.fewest, PERSISTENCE_THRESHOLD, REDUCE_BUCKET, LIVE)
