"""Two Ray nodes give the results of one node, and a run survives the loss of a node.

A node has one CPU, so two workers need both nodes.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import pytest
import torch
from ray.cluster_utils import Cluster

from adapeft.deltas.delta import Delta
from adapeft.subset.subset import Subset
from tests.support.checkpoints import COMMAND, adapeft
from tests.support.namespaces import Namespace, two_namespaces

pytestmark = [pytest.mark.slow, pytest.mark.ray]

QUICKLY = ("calibration=64", "warmup_steps=8", "learning_rate=1e-2")
FEW_STEPS = (*QUICKLY, "max_steps=8")


@pytest.fixture(scope="module")
def alone(config):
    """The folder of a run with two workers on one node."""
    output = config.parent / "alone"
    check(adapeft("run", config, *FEW_STEPS, f"output={output}", timeout=900))
    return output


@contextmanager
def two_nodes(**caches: Path) -> Iterator[Cluster]:
    """Two nodes on this network, with separate caches if ``head`` and ``other`` are given."""
    head, other = ({"XDG_CACHE_HOME": str(caches[name])} if caches else {} for name in ("head", "other"))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "env_vars": head})
    try:
        nodes.add_node(num_cpus=1, env_vars=other)
        yield nodes
    finally:
        nodes.shutdown()


@pytest.fixture
def cluster():
    """Two nodes that share all folders."""
    with two_nodes() as nodes:
        yield nodes


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same_run(output: Path, expected: Path) -> None:
    """Check that subsets are equal, and deltas are equal up to rounding."""
    subset, same = (Subset.load(folder / "subset.safetensors") for folder in (output, expected))
    assert subset.parts == same.parts
    delta, same = (Delta.load(folder / "delta.safetensors") for folder in (output, expected))
    assert delta.changes.keys() == same.changes.keys()
    for name, change in delta.changes.items():
        torch.testing.assert_close(change.values, same.changes[name].values, rtol=1e-3, atol=1e-5)


def test_two_nodes_of_one_network(config, alone, cluster, tmp_path):
    output = tmp_path / "run"
    check(adapeft("run", config, *FEW_STEPS, f"output={output}", timeout=900, RAY_ADDRESS=cluster.address))
    assert_same_run(output, alone)


def test_two_nodes_that_share_a_bucket_alone(config, alone, bucket, tmp_path):
    url, caches = f"{bucket}/runs/mine", {name: tmp_path / name for name in ("head", "other", "launcher")}
    with two_nodes(**caches) as nodes:
        environment = {"RAY_ADDRESS": nodes.address, "XDG_CACHE_HOME": str(caches["launcher"])}
        check(adapeft("run", config, *FEW_STEPS, f"output={url}", timeout=900, **environment))
        for name in ("head", "other"):
            assert list(caches[name].rglob("*-rank-*.log")), f"no rank on {name} had a copy"
        said = adapeft("run", config, *FEW_STEPS, f"output={url}", timeout=900, **environment)
        assert "training: already done" in said.stdout
    files = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    files.get(url, str(tmp_path / "run"), recursive=True)
    assert_same_run(tmp_path / "run", alone)
    logs = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    assert {f"{stage}-rank-{rank}.log" for stage in ("measure", "train") for rank in (0, 1)} <= logs


def test_two_nodes_of_two_networks(config, alone, tmp_path):
    # Paths of sockets have to be short; the folder is removed after all processes that use it.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, two_namespaces() as (head, other):
        environment = _with_token(tmp_path) | {"RAY_TMPDIR": folder}
        address = f"{head.address}:6379"
        _start_ray(head, environment, "--head", "--port=6379", "--include-dashboard=false")
        _start_ray(other, environment, f"--address={address}")
        output = tmp_path / "run"
        done = subprocess.run(
            head.command(str(COMMAND), "run", str(config), *FEW_STEPS, f"output={output}"),
            env=environment | {"RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        check(done)
    assert_same_run(output, alone)


def test_a_lost_node_ends_training_and_the_same_command_goes_on(config, cluster, tmp_path):
    output = tmp_path / "run"
    command = ("run", str(config), *QUICKLY, "max_steps=400", "save_steps=5", "eval_steps=400", f"output={output}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": cluster.address}
    process = subprocess.Popen(
        [str(COMMAND), *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_for_a_checkpoint(output, process)
        (worker,) = cluster.worker_nodes
        cluster.remove_node(worker, allow_graceful=False)
        said, errors = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 1, said + errors
    assert "Its process or machine is gone. Run the same command again to resume from what was saved." in errors
    assert not (output / "metrics.json").exists() or "after" not in json.loads((output / "metrics.json").read_text())

    cluster.add_node(num_cpus=1)
    check(adapeft(*command, timeout=900, RAY_ADDRESS=cluster.address))
    lines = [json.loads(line) for line in (output / "logs" / "events.jsonl").read_text().splitlines()]
    (failed,) = [index for index, line in enumerate(lines) if line["message"] == "failed"]
    (resumed,) = [index for index, line in enumerate(lines) if line["message"] == "resuming"]
    assert failed < resumed
    assert lines[resumed]["done"] >= 5
    assert json.loads((output / "metrics.json").read_text())["num_steps"] == 400


def _with_token(folder: Path) -> dict[str, str]:
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    return os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def _start_ray(node: Namespace, environment: dict[str, str], *arguments: str) -> None:
    """Start a raylet and wait until it has started; it ends with its namespace."""
    done = subprocess.run(
        node.command(
            *(str(COMMAND.with_name("ray")), "start", "--num-cpus=1", "--disable-usage-stats"),
            *(f"--node-ip-address={node.address}", *arguments),
        ),
        # The host name cannot be resolved in the namespace.
        env=environment | {"GLOO_SOCKET_IFNAME": node.interface},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def _wait_for_a_checkpoint(output: Path, process: subprocess.Popen[str], timeout: float = 600) -> None:
    deadline = time.monotonic() + timeout
    while not list(output.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
