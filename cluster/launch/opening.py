"""Which launcher a config asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapeft.sections.cluster import Cluster
from cluster.launch import forks

if TYPE_CHECKING:
    from cluster.launch.launcher import Launcher


def prepare(cluster: Cluster) -> None:
    """Begins whatever can be done for ``open_launcher`` while this process does something else.

    Importing the libraries takes this process as long as the one that workers are forks of.
    """
    if _launcher_of(cluster) == "local":
        forks.prepare(cluster)


def open_launcher(cluster: Cluster, metadata: Mapping[str, str] | None = None) -> Launcher:
    """The launcher that ``cluster.launcher`` names.

    ``auto`` is ``local`` for one worker where ``RAY_ADDRESS`` names no cluster, and otherwise ``ray``.

    Args:
        cluster: what is wanted of it.
        metadata: what a cluster's list of jobs says about this one.
    """
    # Imported here: torch and Ray take seconds.
    if _launcher_of(cluster) == "local":
        from cluster.launch.local import LocalLauncher

        return LocalLauncher(cluster)
    from cluster.launch.ray.launcher import RayLauncher

    return RayLauncher(cluster, metadata or {})


def _launcher_of(cluster: Cluster) -> str:
    if cluster.launcher != "auto":
        return cluster.launcher
    return "local" if cluster.workers == 1 and "RAY_ADDRESS" not in os.environ else "ray"
