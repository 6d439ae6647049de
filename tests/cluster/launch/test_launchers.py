"""Every launcher: results, events and errors come back, workers serve all stages, and nothing floods the terminal."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

from adapeft.config.load import parse_config
from adapeft.errors import AdapeftError
from adapeft.sections.cluster import Cluster
from cluster.failure import WorkerError
from cluster.launch.cause import Failure, worker_error
from cluster.launch.launcher import Launcher
from cluster.launch.local import LocalLauncher
from cluster.launch.opening import open_launcher
from cluster.launch.resources import room_in
from cluster.output.identity import run_id
from cluster.run.session import Session
from cluster.terminal.console import Terminal
from tests.on_ranks import functions as rank_functions
from tests.support.checkpoints import COMMAND, write_bert, write_colours, write_config

pytestmark = pytest.mark.ray

# Workers on Ray take 20 s to load their libraries again after every failure.
SLOW_ON_RAY = ["local", pytest.param("ray", marks=pytest.mark.slow)]


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


@pytest.fixture(scope="module", params=["local", "ray"])
def launcher(request, config):
    with open_launcher(config.cluster.model_copy(update={"launcher": request.param}), {"run": "mine-1"}) as opened:
        yield opened


def logs_of(config) -> Path:
    return Path(config.output) / "logs"


def with_cluster(config, **settings):
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=settings)})


def test_results_and_events_come_back(launcher, config, capfd):
    events = []
    result = launcher.run(rank_functions.count_to_three, config, "count", events.append, start=4)
    process = result.pop("process")
    # A worker with a lower priority than its launcher would starve next to any other process.
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert result == {"sum": 7, "output": config.output, "priority": own}
    assert events[0] == {"stage": "count", "step": "counting", "done": 1, "total": 3}
    assert events[-1] == {"stage": "count", "step": "counting", "done": 3, "total": 3}
    logs = sorted(logs_of(config).glob("count*"))
    assert [path.name for path in logs] == ["count-rank-0.log", "count-rank-1.log"]
    for path in logs:
        assert "printed on a rank" in path.read_text()
        path.unlink()
    again = launcher.run(rank_functions.count_to_three, config, "again", events.append, start=5)
    assert (again["sum"], again["process"]) == (8, process), "the workers of the first stage"
    said = capfd.readouterr()
    assert said.out + said.err == ""


_MAP_AGAIN = """
import sys
from adapeft.config.config import Config
from cluster.launch.opening import open_launcher
from tests.on_ranks import functions

config = Config.model_validate_json(sys.argv[1])
with open_launcher(config.cluster.model_copy(update={"launcher": sys.argv[2]}), {"run": "mine-1"}) as launcher:
    found = launcher.run(functions.map_again, config, "map", lambda event: None, mebibytes=8)
print("mapped", found["mapped"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the settings are glibc's")
@pytest.mark.parametrize("kind", ["local", "ray"])
def test_freed_blocks_of_ranks_go_back_to_the_system(kind, config):
    """By default glibc maps no block that is as large as one it has freed: it would keep that in its heap.

    In a new process, because local workers are forked from one that reads its settings when it starts, and another test
    may have started it.
    """
    command = [sys.executable, "-c", _MAP_AGAIN, config.model_dump_json(), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout.split("mapped ")[1]) >= 8 * 2**20


@pytest.mark.parametrize("launcher", SLOW_ON_RAY, indirect=True)
def test_each_stage_has_a_peak_of_its_own(launcher, config):
    large = launcher.run(rank_functions.hold, config, "large", print, mebibytes=400)["peak"]
    small = launcher.run(rank_functions.hold, config, "small", print, mebibytes=1)["peak"]
    assert large - small > 300 * 2**20


def test_a_users_error_of_one_rank_is_no_lost_worker(launcher, config):
    with pytest.raises(AdapeftError, match=r"^data\.text = x: found only by rank 1\. Correct it\.$"):
        launcher.run(rank_functions.refuse_on_one, config, "refuse-on-one", print)


@pytest.mark.parametrize("launcher", SLOW_ON_RAY, indirect=True)
def test_a_users_error_comes_back_as_such(launcher, config):
    with pytest.raises(AdapeftError, match=r"^data\.text = 'x': found only by a rank\. Correct it\.$"):
        launcher.run(rank_functions.refuse, config, "refuse", print)


@pytest.mark.parametrize("launcher", SLOW_ON_RAY, indirect=True)
def test_a_failure_is_short_and_says_where_to_read_on(launcher, config, capfd):
    with pytest.raises(WorkerError) as failure:
        launcher.run(rank_functions.break_down, config, "break", print)
    message = str(failure.value)
    lines = [json.loads(line) for line in (logs_of(config) / "break-rank-1.jsonl").read_text().splitlines()]
    assert lines[-1]["message"].startswith("ZeroDivisionError: no value to divide by")
    assert (lines[-1]["level"], lines[-1]["run"], lines[-1]["rank"]) == ("ERROR", "mine-1", 1)
    assert message.startswith("a worker failed: ZeroDivisionError: no value to divide by\n")
    assert str(logs_of(config)) in message
    assert len(message.splitlines()) == 2
    log = (logs_of(config) / "break-rank-0.log").read_text()
    assert "Traceback" in log
    assert "in break_down" in log
    said = capfd.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize("launcher", SLOW_ON_RAY, indirect=True)
def test_a_hanging_collective_ends_with_its_cause(launcher, config):
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?i)timed out|timeout"):
        launcher.run(rank_functions.hang, with_cluster(config, collective_timeout=5), "hang", print)
    assert time.monotonic() - started < 120


def test_a_lost_worker_ends_the_run_with_its_cause(launcher, config):
    with pytest.raises(
        WorkerError, match=r"a worker failed: (?s:.*)Run the same command again to resume from what was saved"
    ):
        launcher.run(rank_functions.die, config, "die", print)


@pytest.mark.parametrize("launcher", SLOW_ON_RAY, indirect=True)
def test_after_a_failure_new_workers_serve_the_next_stage(launcher, config):
    with pytest.raises(WorkerError):
        launcher.run(rank_functions.die, config, "die", print)
    assert launcher.run(rank_functions.count_to_three, config, "after", print, start=1)["sum"] == 4


@pytest.mark.parametrize(
    ("launcher", "workers", "address", "expected"),
    [
        ("auto", 1, None, "LocalLauncher"),
        ("auto", 2, None, "RayLauncher"),
        ("auto", 1, "127.0.0.1:6379", "RayLauncher"),
        ("local", 2, "127.0.0.1:6379", "LocalLauncher"),
        ("ray", 1, None, "RayLauncher"),
    ],
)
def test_which_launcher_starts_the_workers(launcher, workers, address, expected, monkeypatch):
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("cluster.launch.ray.launcher.connect", lambda cluster, metadata: None)
    opened = open_launcher(Cluster(launcher=launcher, workers=workers), {"run": "mine-1"})
    assert type(opened).__name__ == expected


def test_more_workers_than_this_machine_has_room_for():
    with pytest.raises(AdapeftError, match=r"cluster.workers = 999: .* required: 999 CPUs \("):
        LocalLauncher(Cluster(launcher="local", workers=999), "mine-1").room()


@pytest.mark.parametrize(("there", "workers"), [(3, 3), (9, 8), (20, 8), (2, 2)])
def test_a_run_starts_with_the_workers_that_there_is_room_for(there, workers):
    cluster = Cluster(workers=8, min_workers=2, cpus_per_worker=2, gpus_per_worker=1)
    assert room_in(cluster, {"CPU": 2.0 * there + 1, "GPU": 8.0}) == workers


def test_fewer_workers_than_the_run_may_have():
    with pytest.raises(AdapeftError, match=r"cluster.min_workers = 2: .* required: 4 CPUs \(3 available\)"):
        room_in(Cluster(workers=8, min_workers=2, cpus_per_worker=2), {"CPU": 3.0})


class Scripted(Launcher):
    """Returns or raises ``outcomes`` in turn, with resources for the numbers of workers in ``rooms``."""

    def __init__(self, rooms, outcomes, run="mine-1"):
        super().__init__(Cluster(), run)
        self.rooms, self.outcomes, self.stages = list(rooms), list(outcomes), []

    @property
    def workers(self):
        """The number of workers of each stage, and the smallest that it may have."""
        return [(stage.config.cluster.workers, stage.config.cluster.min_workers) for stage in self.stages]

    def room(self):
        return self.rooms.pop(0)

    def _start(self, config, watch):
        raise AssertionError("nothing is started")

    def _run(self, stage, watch):
        self.stages.append(stage)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def session_on(launcher, config, monkeypatch):
    monkeypatch.setattr("cluster.launch.opening.open_launcher", lambda cluster, metadata: launcher)
    return Session(config, Terminal())


def test_stages_run_on_the_workers_that_are_there(config, monkeypatch, capsys):
    launcher = Scripted([3], [{}, {}])
    session = session_on(launcher, with_cluster(config, workers=8, min_workers=2), monkeypatch)
    session.on_workers(rank_functions.hang, "measure")
    session.on_workers(rank_functions.hang, "train")
    assert launcher.workers == [(3, None)] * 2
    assert capsys.readouterr().out.count("workers: 3 of 8") == 1


@pytest.mark.parametrize("max_failures", [0, 1, 2])
def test_failed_workers_are_replaced_up_to_max_failures_times(config, monkeypatch, capsys, max_failures):
    gone = WorkerError("a worker failed: gone")
    launcher = Scripted([3, 2, 2], [gone, gone, {"done": True}])
    settings = with_cluster(config, workers=3, min_workers=2, max_failures=max_failures)
    session = session_on(launcher, settings, monkeypatch)
    expected = nullcontext() if max_failures == 2 else pytest.raises(WorkerError, match="gone")
    with expected:
        assert session.on_workers(rank_functions.hang, "measure") == {"done": True}
    assert [workers for workers, _ in launcher.workers] == [3, 2, 2][: max_failures + 1]
    said = capsys.readouterr().out
    assert said.count("a worker failed: gone") == max_failures
    assert said.count("workers: 2 of 3") == max_failures


def test_a_run_keeps_its_identity_when_its_learning_rate_is_found(config, monkeypatch):
    given = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": "auto"})})
    opened = []
    monkeypatch.setattr(
        "cluster.launch.opening.open_launcher",
        lambda cluster, metadata: opened.append(metadata) or Scripted([1], [{}], metadata["run"]),
    )
    session = Session(given, Terminal())
    session.settle(1e-3)
    session.on_workers(rank_functions.hang, "train")
    launcher, _, _ = session._launched
    assert opened[0]["run"] == launcher.stages[0].run_id == run_id(given) != run_id(session.config)


WATCHED = """
import sys
from adapeft.config.load import read_config
from cluster.launch.opening import open_launcher
from tests.on_ranks.functions import go_on

def watch(event):
    raise OSError("the disk of the launching process is full")

config = read_config(sys.argv[1], ["cluster.workers=1", f"cluster.launcher={sys.argv[2]}"])
with open_launcher(config.cluster, {"run": "mine-1"}) as launcher:
    launcher.run(go_on, config, "watched", watch)
"""


@pytest.mark.parametrize("launcher", SLOW_ON_RAY)
def test_an_error_in_the_callback_ends_the_run_immediately(launcher, tmp_path):
    """Such as an error of the storage, after which the ranks would continue for hours."""
    config = write_config(tmp_path / "run.yaml", tmp_path, tmp_path, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(config), launcher], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 1
    assert done.stderr.endswith("OSError: the disk of the launching process is full\n"), done.stderr


@pytest.mark.parametrize("launcher", SLOW_ON_RAY)
def test_an_interrupt_ends_a_run_and_its_workers_quickly(launcher, tmp_path):
    config = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    process = subprocess.Popen(
        [str(COMMAND), "run", str(config), f"cluster.launcher={launcher}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        # Background processes of a shell ignore interrupts, and their child processes would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("measure: starting workers"):
            break
    time.sleep(3)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(lines) + rest
    assert re.fullmatch(r"(measure: .*\n)*stopped; the same command resumes from .*run\n", rest), rest
    if launcher == "local":  # Ray ends its own processes later
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert alive == []
    events = (tmp_path / "run" / "logs" / "events.jsonl").read_text().splitlines()
    assert json.loads(events[-1])["message"] == "interrupted"


def test_an_index_error_on_a_gpu_is_an_input_error():
    """CUDA reports it in a later call, so the batch is not known."""
    text = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous"
    found = worker_error([Failure("RuntimeError", text)], Path("logs"))
    assert isinstance(found, AdapeftError)
    assert "is out of range for one of the model's tables" in str(found)
    other = worker_error([Failure("RuntimeError", "CUDA error: an illegal memory access")], Path("logs"))
    assert isinstance(other, WorkerError)


def test_the_cause_is_that_of_the_rank_that_failed_first():
    seen = Failure("RuntimeError", "Connection closed by peer [127.0.0.1]:1")
    error = worker_error([seen, Failure("ZeroDivisionError", "no value\nmore")], Path("logs"))
    assert str(error) == "a worker failed: ZeroDivisionError: no value\nSee the logs in logs."
    lost = worker_error([seen, Failure("WorkerError", "rank 1 ended by SIGKILL", is_lost=True)], Path("logs"))
    assert str(lost).startswith("a worker failed: WorkerError: rank 1 ended by SIGKILL\n")
    assert "gone" in str(worker_error([seen], Path("logs")))
