"""Connection to a Ray cluster, and the number of workers that fit its resources."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig
from ray.util.placement_group import placement_group, remove_placement_group

from adapeft.errors import AdapeftError
from adapeft.sections.cluster import Cluster
from cluster.failure import WorkerError
from cluster.launch.resources import environment_of, missing, per_worker, room_in

_LOCAL = "local"


def connect(cluster: Cluster, metadata: Mapping[str, str]) -> None:
    """Connect to the cluster at ``RAY_ADDRESS``, or start a local one.

    Raises:
        AdapeftError: no cluster answers there, or it rejects this process or runs other versions.
        WorkerError: a local one did not start in time.
    """
    # Ray would set CUDA_VISIBLE_DEVICES="" for workers without a GPU, and warns that it soon will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default of 15 yields to every other process: next to two busy ones, a tiny run took 13 minutes to load.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # In a job Ray refuses to start when the job's environment sets a variable that the workers' sets too.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    # Otherwise Ray Train prints advice on its own version to the terminal.
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        # Worker output goes to files in the run folder: the terminal is for progress.
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": environment_of(cluster)},
        "job_config": JobConfig(metadata=dict(metadata)),
    }
    address = address_of()
    check_answers(address, cluster.resource_timeout)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, AuthenticationError) as error:
        raise AdapeftError(
            f"RAY_ADDRESS = {address}: the cluster rejected this process. Set the cluster's token "
            f"(RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS to use only this "
            f"machine."
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise AdapeftError(
            f"RAY_ADDRESS = {address}: the cluster runs other versions: {error}\nInstall the cluster's versions here, "
            "or send the run to the cluster with `adapeft submit`."
        ) from error
    except Exception as error:
        # Ray has no exception class for this. Observed on two cores under a load of 20.
        if "timed out during startup" not in str(error):
            raise
        raise WorkerError(
            f"Ray did not start on this machine in time: {error} Run the command again when the machine is "
            f"less busy; finished results are kept."
        ) from error


def room_for(cluster: Cluster) -> int:
    """Return the number of workers that the cluster's resources allow, at most ``cluster.workers``.

    Raises:
        AdapeftError: the resources do not suffice for the minimum number of workers; the message lists what is missing.
    """
    # Machines may still be joining a cluster; none will join the local one of this process.
    return wait_for_room(cluster, 0.0 if address_of() == _LOCAL else cluster.resource_timeout)


def wait_for_room(cluster: Cluster, timeout: float) -> int:
    """Return the result of ``room_for`` after at most ``timeout`` seconds, with a request to any autoscaler."""
    deadline = time.monotonic() + timeout
    there = ray.cluster_resources()
    with _demand(cluster) if missing(cluster, there) and timeout else nullcontext():
        while missing(cluster, there) and time.monotonic() < deadline:
            time.sleep(min(1.0, deadline - time.monotonic() + 0.01))
            there = ray.cluster_resources()
    return room_in(cluster, there, timeout)


def address_of() -> str:
    """Return the address of the cluster to join; ``local`` starts one."""
    # Not "auto": that would join the local cluster of any other program on this machine, and wait for its workers.
    return os.environ.get("RAY_ADDRESS", _LOCAL)


def check_answers(address: str, timeout: float) -> None:
    """Probe ``host:port`` first: Ray itself would retry for minutes and fill the terminal with messages.

    Args:
        address: value of ``RAY_ADDRESS``; ``auto`` and ``local`` are not probed.
        timeout: seconds to wait for an answer.

    Raises:
        AdapeftError: no cluster answers, or the address is that of a dashboard.
    """
    if address.startswith(("http://", "https://")):
        raise AdapeftError(
            f"RAY_ADDRESS = {address}: this is a dashboard, to which `adapeft submit` sends runs. To join the cluster "
            "from one of its machines, set HOST:6379."
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto" or "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
    except OSError as error:
        raise AdapeftError(
            f"RAY_ADDRESS = {address}: no cluster answers at this address ({error}). Start one with "
            f"`ray start --head`, or unset RAY_ADDRESS to use only this machine."
        ) from error


@contextmanager
def _demand(cluster: Cluster) -> Iterator[None]:
    """Request the workers' resources from an autoscaler for the duration of the block.

    A request by ``ray.autoscaler.sdk.request_resources`` would outlive this process, and keep idle machines running.
    """
    group = placement_group([per_worker(cluster)] * cluster.workers)
    try:
        yield
    finally:
        remove_placement_group(group)
