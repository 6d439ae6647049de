"""Launching on a real local Ray: results, events and errors come back; nothing floods the terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from ray.exceptions import AuthenticationError
from ray.util import placement_group_table

from adapeft.config.load import parse_config
from adapeft.errors import AdapeftError
from adapeft.sections.cluster import Cluster
from cluster.failure import WorkerError
from cluster.launch import ray as launch
from cluster.output.identity import run_id
from cluster.run.session import Session
from cluster.terminal.console import Terminal
from tests.on_ranks import functions as rank_functions
from tests.support.checkpoints import COMMAND, write_bert, write_colours, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return parse_config(
        {
            "model": {"name": "base", "task": "causal-lm"},
            "data": {"train": "a.txt", "evaluation": "b.txt"},
            "output": str(tmp_path_factory.mktemp("launch") / "run"),
            "cluster": {"workers": 2},
        }
    )


@pytest.fixture(scope="module")
def local_ray(config):
    with launch.ray_session(config.cluster):
        yield


def logs_of(config) -> Path:
    return Path(config.output) / "logs"


def test_results_and_events_come_back(local_ray, config, capfd):
    events = []
    result = launch.run_on_workers(rank_functions.count_to_three, config, "count", events.append, start=4)
    # A worker of lower priority than its launcher starves beside any other process.
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert result == {"sum": 7, "output": config.output, "priority": own}
    assert events[0] == {"stage": "count", "step": "counting", "done": 1, "total": 3}
    assert events[-1] == {"stage": "count", "step": "counting", "done": 3, "total": 3}
    assert sorted(path.name for path in logs_of(config).iterdir()) == ["count-rank-0.log", "count-rank-1.log"]
    for path in logs_of(config).iterdir():
        assert "printed on a rank" in path.read_text()
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_a_users_error_of_one_rank_is_no_lost_worker(local_ray, config):
    with pytest.raises(AdapeftError, match=r"^data\.text = x: found only by rank 1\. Mend it\.$"):
        launch.run_on_workers(rank_functions.refuse_on_one, config, "refuse-on-one", print)


def test_a_users_error_comes_back_as_such(local_ray, config):
    with pytest.raises(AdapeftError, match=r"^data\.text = 'x': found only by a rank\. Mend it\.$"):
        launch.run_on_workers(rank_functions.refuse, config, "refuse", print)


def test_a_failure_is_short_and_says_where_to_read_on(local_ray, config, capfd):
    with pytest.raises(WorkerError) as failure:
        launch.run_on_workers(rank_functions.break_down, config, "break", print)
    message = str(failure.value)
    lines = [json.loads(line) for line in (logs_of(config) / "break-rank-1.jsonl").read_text().splitlines()]
    assert lines[-1]["message"].startswith("ZeroDivisionError: no value to divide by")
    assert (lines[-1]["level"], lines[-1]["run"], lines[-1]["rank"]) == ("ERROR", run_id(config), 1)
    assert message.startswith("a worker failed: ZeroDivisionError: no value to divide by\n")
    assert str(logs_of(config)) in message
    assert len(message.splitlines()) == 2
    log = (logs_of(config) / "break-rank-0.log").read_text()
    assert "Traceback" in log
    assert "in break_down" in log
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_a_hanging_collective_ends_with_its_cause(local_ray, config):
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?i)timed out|timeout"):
        launch.run_on_workers(rank_functions.hang, with_cluster(config, collective_timeout=5), "hang", print)
    assert time.monotonic() - started < 120


def test_a_lost_worker_ends_the_run_with_its_cause(local_ray, config):
    with pytest.raises(WorkerError, match=r"a worker failed: (?s:.*)the same command goes on from what was saved"):
        launch.run_on_workers(rank_functions.die, config, "die", print)


def with_cluster(config, **settings):
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=settings)})


def test_too_many_workers(local_ray):
    cluster = Cluster(workers=999, gpus_per_worker=1)
    started = time.monotonic()
    with pytest.raises(AdapeftError) as error:
        launch._wait_for_resources(cluster, timeout=2)
    assert 2 <= time.monotonic() - started < 5
    message = str(error.value)
    assert re.match(r"cluster.workers = 999: the cluster has too little after 2 s; wanted are 999 CPUs \(", message)
    assert "999 GPUs (0 there)" in message
    assert "Lower cluster.workers" in message
    with pytest.raises(AdapeftError, match="the cluster has too little; wanted are 999 CPUs"):
        launch._wait_for_resources(cluster, timeout=0)


@pytest.mark.parametrize(("there", "workers"), [(3, 3), (9, 8), (20, 8), (2, 2)])
def test_a_run_starts_with_the_workers_that_there_is_room_for(there, workers, monkeypatch):
    monkeypatch.setattr(launch.ray, "cluster_resources", lambda: {"CPU": 2.0 * there + 1, "GPU": 8.0})
    cluster = Cluster(workers=8, min_workers=2, cpus_per_worker=2, gpus_per_worker=1)
    assert launch._wait_for_resources(cluster, timeout=0) == workers


def test_fewer_workers_than_the_run_may_have(monkeypatch):
    monkeypatch.setattr(launch.ray, "cluster_resources", lambda: {"CPU": 3.0})
    with pytest.raises(AdapeftError, match=r"cluster.min_workers = 2: .* wanted are 4 CPUs \(3 there\)"):
        launch._wait_for_resources(Cluster(workers=8, min_workers=2, cpus_per_worker=2), timeout=0)


def test_stages_run_on_the_workers_that_are_there(config, monkeypatch, capsys):
    seen = []

    def run(function, config, stage, watch, *, puts):
        seen.append((config.cluster.workers, config.cluster.min_workers))
        return {}

    monkeypatch.setattr(launch, "ray_session", lambda cluster, metadata: nullcontext(3))
    monkeypatch.setattr(launch, "run_on_workers", run)
    session = Session(with_cluster(config, workers=8, min_workers=2), Terminal())
    session.on_workers(rank_functions.hang, "measure")
    session.on_workers(rank_functions.hang, "train")
    assert seen == [(3, None)] * 2
    assert capsys.readouterr().out.count("workers: 3 of 8") == 1


@pytest.mark.parametrize("max_failures", [0, 1, 2])
def test_workers_that_fail_are_replaced_so_many_times(config, monkeypatch, capsys, max_failures):
    workers = []

    def run(function, config, stage, watch, *, puts):
        workers.append(config.cluster.workers)
        if len(workers) < 3:
            raise WorkerError("a worker failed: gone")
        return {"done": True}

    monkeypatch.setattr(launch, "ray_session", lambda cluster, metadata: nullcontext(3))
    monkeypatch.setattr(launch, "room_for", lambda cluster: 2)
    monkeypatch.setattr(launch, "run_on_workers", run)
    session = Session(with_cluster(config, workers=3, min_workers=2, max_failures=max_failures), Terminal())
    expected = nullcontext() if max_failures == 2 else pytest.raises(WorkerError, match="gone")
    with expected:
        assert session.on_workers(rank_functions.hang, "measure") == {"done": True}
    assert workers == [3, 2, 2][: max_failures + 1]
    said = capsys.readouterr().out
    assert said.count("a worker failed: gone") == max_failures
    assert said.count("workers: 2 of 3") == max_failures


def test_an_autoscaler_sees_what_is_wanted_while_it_is_waited_for(local_ray):
    def pending() -> list[dict[int, dict[str, float]]]:
        return [group["bundles"] for group in placement_group_table().values() if group["state"] == "PENDING"]

    assert pending() == []
    waiting = launch._in_background(lambda: launch._wait_for_resources(Cluster(workers=3, cpus_per_worker=500), 5))
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
        pytest.raises(AdapeftError, match=rf"RAY_ADDRESS = {address}: no cluster answers there .*`ray start --head`"),
        launch.ray_session(Cluster()),
    ):
        pass


def test_the_address_of_a_dashboard(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with (
        pytest.raises(AdapeftError, match=r"RAY_ADDRESS = http://127\.0\.0\.1:8265: .*`adapeft submit`"),
        launch.ray_session(Cluster()),
    ):
        pass


@pytest.mark.parametrize(
    ("failure", "complaint"),
    [
        (AuthenticationError("no token"), "does not let this process in. Give it the cluster's token"),
        (RuntimeError("Version mismatch: Ray: 2.9.3"), "runs other versions: Version mismatch: Ray: 2.9.3"),
    ],
)
def test_a_cluster_that_is_not_joined(failure, complaint, monkeypatch):
    def refuse(**options):
        raise failure

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(launch.ray, "init", refuse)
    with pytest.raises(AdapeftError, match=f"RAY_ADDRESS = auto: the cluster there {complaint}"):
        launch._connect(Cluster(), {})


def test_a_cluster_that_starts_too_slowly(monkeypatch):
    def time_out(**options):
        raise Exception("The current node timed out during startup. This could happen")

    monkeypatch.setattr(launch.ray, "init", time_out)
    with pytest.raises(WorkerError, match="did not start on this machine in time"):
        launch._connect(Cluster(), {})


WATCHED = """
import sys
from adapeft.config.load import read_config
from cluster.launch.ray import ray_session, run_on_workers
from tests.on_ranks.functions import go_on

def watch(event):
    raise OSError("the disk of whoever watches is full")

config = read_config(sys.argv[1], ["cluster.workers=1"])
with ray_session(config.cluster):
    run_on_workers(go_on, config, "watched", watch)
"""


@pytest.mark.slow
def test_an_error_of_who_watches_ends_the_run_at_once(tmp_path):
    """Of a storage that takes nothing any more: the ranks would go on for hours."""
    config = write_config(tmp_path / "run.yaml", tmp_path, tmp_path, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(config)], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 1
    assert done.stderr.endswith("OSError: the disk of whoever watches is full\n"), done.stderr


def test_an_interrupt_ends_a_run_quickly(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    process = subprocess.Popen(
        [str(COMMAND), "run", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        # What a shell starts in the background ignores interrupts, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("measure: starting workers"):
            break
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(lines) + rest
    assert re.fullmatch(r"stopped; the same command goes on with what is in .*run\n", rest), rest
    events = (tmp_path / "run" / "logs" / "events.jsonl").read_text().splitlines()
    assert json.loads(events[-1])["message"] == "interrupted"


def test_an_index_that_only_a_gpu_has_seen_is_the_inputs():
    """CUDA reports it in whatever call comes next, so that no batch can be named."""
    error = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous")
    found = launch._cause(error, Path("logs"))
    assert isinstance(found, AdapeftError)
    assert "an index that one of its tables does not have" in str(found)
    assert isinstance(launch._cause(RuntimeError("CUDA error: an illegal memory access"), Path("logs")), WorkerError)
