"""Choice of the launcher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapeft.sections.cluster import Cluster
from cluster.launch import forks

if TYPE_CHECKING:
    from cluster.launch.launcher import Launcher


def prepare(cluster: Cluster) -> None:
    """Start preparing ``open_launcher`` in the background.

    The fork server then imports the workers' libraries while this process imports its own, which takes as long.
    """
    if cluster.launched_by(os.environ.get("RAY_ADDRESS")) == "local":
        forks.prepare(cluster)


def open_launcher(cluster: Cluster, metadata: Mapping[str, str]) -> Launcher:
    """Return the launcher that ``cluster.launcher`` names.

    Args:
        cluster: number, resources and settings of the workers.
        metadata: metadata of this run in the cluster's list of jobs, as of ``job_metadata``.
    """
    # Imported here: torch and Ray take seconds.
    if cluster.launched_by(os.environ.get("RAY_ADDRESS")) == "local":
        from cluster.launch.local import LocalLauncher

        return LocalLauncher(cluster, metadata["run"])
    from cluster.launch.ray.launcher import RayLauncher

    return RayLauncher(cluster, metadata)
