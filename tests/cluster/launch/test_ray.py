"""Connecting to a Ray cluster, waiting for resources, and requests to an autoscaler."""

from __future__ import annotations

import re
import time

import pytest
from ray.exceptions import AuthenticationError
from ray.util import placement_group_table

from adapeft.errors import AdapeftError
from adapeft.sections.cluster import Cluster
from cluster.failure import WorkerError
from cluster.launch.opening import open_launcher
from cluster.launch.ray import connection
from cluster.launch.ray.launcher import _in_background

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def local_ray():
    with open_launcher(Cluster(launcher="ray"), {"run": "mine-1"}):
        yield


def test_too_many_workers(local_ray):
    cluster = Cluster(workers=999, gpus_per_worker=1)
    started = time.monotonic()
    with pytest.raises(AdapeftError) as error:
        connection.wait_for_room(cluster, timeout=2)
    assert 2 <= time.monotonic() - started < 5
    message = str(error.value)
    assert re.match(
        r"cluster.workers = 999: the cluster has too few resources after 2 s; required: 999 CPUs \(", message
    )
    assert "999 GPUs (0 available)" in message
    assert "Lower cluster.workers" in message
    with pytest.raises(AdapeftError, match="the cluster has too few resources; required: 999 CPUs"):
        connection.wait_for_room(cluster, timeout=0)


def test_an_autoscaler_sees_the_request_while_the_launcher_waits(local_ray):
    def pending() -> list[dict[int, dict[str, float]]]:
        return [group["bundles"] for group in placement_group_table().values() if group["state"] == "PENDING"]

    assert pending() == []
    waiting = _in_background(lambda: connection.wait_for_room(Cluster(workers=3, cpus_per_worker=500), 5))
    deadline = time.monotonic() + 4
    while not pending() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pending() == [{index: {"CPU": 500} for index in range(3)}]
    assert isinstance(waiting.exception(), AdapeftError)
    assert pending() == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_does_not_answer(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(
            AdapeftError, match=rf"RAY_ADDRESS = {address}: no cluster answers at this address .*`ray start --head`"
        ),
        open_launcher(Cluster(launcher="ray"), {"run": "mine-1"}),
    ):
        pass


def test_the_address_of_a_dashboard(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with (
        pytest.raises(AdapeftError, match=r"RAY_ADDRESS = http://127\.0\.0\.1:8265: .*`adapeft submit`"),
        open_launcher(Cluster(launcher="ray"), {"run": "mine-1"}),
    ):
        pass


@pytest.mark.parametrize(
    ("failure", "complaint"),
    [
        (AuthenticationError("no token"), "the cluster rejected this process. Set the cluster's token"),
        (RuntimeError("Version mismatch: Ray: 2.9.3"), "the cluster runs other versions: Version mismatch: Ray: 2.9.3"),
    ],
)
def test_a_cluster_that_is_not_joined(failure, complaint, monkeypatch):
    def refuse(**options):
        raise failure

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(connection.ray, "init", refuse)
    with pytest.raises(AdapeftError, match=f"RAY_ADDRESS = auto: {complaint}"):
        connection.connect(Cluster(), {})


def test_a_cluster_that_starts_too_slowly(monkeypatch):
    def time_out(**options):
        raise Exception("The current node timed out during startup. This could happen")

    monkeypatch.setattr(connection.ray, "init", time_out)
    with pytest.raises(WorkerError, match="did not start on this machine in time"):
        connection.connect(Cluster(), {})
