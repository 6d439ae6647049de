"""What DeepSpeed's ZeRO is told beside its stage; known without importing it."""

from __future__ import annotations

from adapeft.memory.estimate import Zero
from adapeft.sections.cluster import Cluster

PERSISTENCE_THRESHOLD = 1_000_000
"""Elements below which stage 3 keeps a parameter whole on every rank.

Gathering a small matrix for every forward costs more than the memory it frees: MiniLM on two CPU ranks spent 0.47 s of
a step's forward at DeepSpeed's default of 100,000 and 0.17 s at stage 2. A 7 B model's matrices are all above it.
"""
REDUCE_BUCKET = 500_000_000
"""Elements of gradients that are reduced at once, at most. DeepSpeed sets aside as much as it is told: 2 GiB for a
subset of kilobytes, were it not told the smaller number of trained elements."""
LIVE = 1_000_000_000
"""Elements that stage 3 keeps gathered at once, at most; those used again within as many stay until they are."""


def zero_of(cluster: Cluster) -> Zero:
    """How the engines of a run divide their model over its workers, or the fewest that it may have."""
    return Zero(cluster.zero_stage, cluster.fewest, PERSISTENCE_THRESHOLD, REDUCE_BUCKET, LIVE)
