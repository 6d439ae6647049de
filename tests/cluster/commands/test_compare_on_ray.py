"""Comparisons on Ray: runs at once, resumption after a kill, and learning rates by successive halving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from itertools import combinations
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster as RayCluster

from adapeft.config.experiments import Comparison
from adapeft.config.load import load_config, parse_section
from adapeft.errors import AdapeftError
from cluster.commands.compare.halving import trial
from cluster.commands.compare.halving.trial import Trial, Tried
from cluster.commands.compare.machines import opening
from cluster.commands.compare.swept import Swept, load_swept, save_swept
from tests.support.checkpoints import COMMAND, adapeft

QUICKLY = ("workers=1", "max_steps=18", "train.warmup_ratio=0", "seeds=[0]")


def settings(*overrides):
    return parse_section(Comparison, overrides)[0]


def interval(run: Path) -> tuple[datetime, datetime]:
    """Return the times of the first and the last event of a run."""
    lines = (run / "logs" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    first, *_, last = (datetime.fromisoformat(json.loads(line)["time"]) for line in lines)
    return first, last


def deltas(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("**/delta.safetensors")}


@pytest.mark.ray
@pytest.mark.slow
def test_runs_at_once_that_a_killed_comparison_has_finished_are_not_repeated(config, tmp_path):
    output = tmp_path / "out"
    arguments = ["compare", config, *QUICKLY, "launcher=ray", "methods=[random:row,bitfit,lora]", "budgets=[20%]"]
    command = [str(COMMAND), *map(str, arguments), f"output={output}"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = next((line for line in first.stdout if line.startswith("run 1/3")), "")
    first.send_signal(signal.SIGKILL)
    rest = first.communicate()[0]
    assert said, rest
    runs = [path.parent.parent for path in output.glob("**/events.jsonl")]
    assert any(a[0] < b[1] and b[0] < a[1] for a, b in combinations(map(interval, runs), 2)), "one after the other"
    finished = deltas(output)
    assert finished

    again = adapeft(*arguments, f"output={output}", timeout=900)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "run 3/3" in again.stdout
    assert {path: changed for path, changed in deltas(output).items() if path in finished} == finished
    assert len(deltas(output)) == 3
    assert "| lora | 20% |" in (output / "comparison.md").read_text(encoding="utf-8")
    assert not list(output.glob("**/*.pkl"))
    assert not list(output.glob("**/ray")), "the workers of a run that fits on a machine are no Ray workers"


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_whose_workers_fit_on_no_machine_starts_ray_workers(config, tmp_path):
    """Three runs of two workers on two nodes of one CPU each, which hold only one of them at a time."""
    nodes = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes.add_node(num_cpus=1)
        arguments = [config, *QUICKLY[1:], "methods=[random:row,bitfit,lora]", "budgets=[20%]", "workers=2"]
        done = adapeft("compare", *arguments, f"output={tmp_path}", timeout=1500, RAY_ADDRESS=nodes.address)
    finally:
        nodes.shutdown()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(deltas(tmp_path)) == 3
    assert len(list(tmp_path.glob("**/train-rank-1.log"))) == 3


@pytest.mark.ray
@pytest.mark.slow
def test_successive_halving_stops_a_rate_that_learns_nothing_and_takes_the_one_that_does(config, tmp_path):
    """One at a time, from the middle: the good rate trains to the end, the other one meets it at the first rung."""
    arguments = ["compare", config, *QUICKLY, "methods=[adapeft:row]", "budgets=[20%]", "parallel=1", "sweep=asha"]
    # With a rate of its own the head would learn at 1e-12 too.
    arguments += ["learning_rates=[1e-12,5e-2]", "train.head_learning_rate=null", "data.metric=loss"]
    arguments += [f"output={tmp_path / 'out'}"]
    done = adapeft(*arguments, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = tmp_path.glob("out/asha/*/*/asha.json")
    swept = {one["learning_rate"]: one for one in json.loads(record.read_text(encoding="utf-8"))["tried"]}
    assert swept[1e-12]["stopped_step"] == 2, "a ninth of 18 steps"
    assert swept[5e-2]["stopped_step"] is None
    content = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    (run,) = content["runs"]
    assert run["learning_rate"] == 5e-2
    assert run["sweep_seconds"] > 0
    assert not [path for path in (tmp_path / "out").rglob("*") if "pkl" in path.suffix or "pickle" in path.name]

    before = deltas(tmp_path)
    again = adapeft(*arguments, timeout=900)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "sweep 1" not in again.stdout, "it is not swept again"
    assert deltas(tmp_path) == before


class Fake:
    """A process that evaluates at steps 4 and 6, of which the second is seen only when it has ended."""

    def __init__(self, *arguments, log, environment):
        self.polled, self.is_stopped = 0, False
        started.append(self)

    def status(self):
        self.polled += 1
        if self.polled == 1:
            write_evaluations(self.events, 2, 4)
            return None
        write_evaluations(self.events, 2, 4, 6)
        return 0

    def stop(self):
        self.is_stopped = True


started: list[Fake] = []


def write_evaluations(path: Path, *steps: int) -> None:
    lines = [{"message": "evaluated", "at": step, "metric": "f1", "f1": step / 10, "loss": 1.0} for step in (0, *steps)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_trial_reports_what_is_recorded_before_it_starts_a_process(tmp_path, monkeypatch):
    started.clear()
    monkeypatch.setattr(trial, "Process", Fake)
    monkeypatch.setattr(trial, "_POLL_SECONDS", 0)
    settings, Fake.events = tmp_path / "run.yaml", tmp_path / "events.jsonl"
    settings.touch()
    write_evaluations(Fake.events, 2)

    def make(is_finished):
        tried = Tried(0, str(settings), str(tmp_path / "log"), str(Fake.events), is_finished, 6, "f1", {})
        return Trial({"number": 0, "all": [tried._asdict()]})

    running = make(False)
    assert running.step() == {"step": 2, "f1": 0.2, "loss": 1.0, "status": None}
    assert not started
    assert running.step()["step"] == 4
    assert running.step() == {"step": 6, "f1": 0.6, "loss": 1.0, "status": 0, "done": True}
    running.cleanup()
    assert started[0].is_stopped
    finished = make(True)
    assert [finished.step()["step"] for _ in range(3)] == [2, 4, 6]
    assert len(started) == 1
    settings.unlink()
    with pytest.raises(FileNotFoundError, match="Set output to a folder on storage that all machines share"):
        make(False)


def test_the_result_of_a_sweep_counts_only_for_the_same_runs(tmp_path):
    swept = Swept(1e-2, {1e-3: 0.5, 1e-2: 0.75, 1e-1: float("nan")}, None, 12.5, {1e-3: 4})
    runs = {1e-3: "a", 1e-2: "b", 1e-1: "c"}
    save_swept(tmp_path / "asha.json", swept, runs)
    assert repr(load_swept(tmp_path / "asha.json", runs)) == repr(swept)
    assert load_swept(tmp_path / "asha.json", runs | {1e-1: "d"}) is None
    assert load_swept(tmp_path / "asha.json", runs | {1.0: "e"}) is None
    assert load_swept(tmp_path / "none.json", runs) is None
    (tmp_path / "asha.json").write_text('{"best": 1}')
    with pytest.raises(AdapeftError, match=r"asha\.json: damaged.* Remove it"):
        load_swept(tmp_path / "asha.json", runs)


def test_a_process_ends_when_what_has_started_it_is_killed(tmp_path):
    """The command waits on a FIFO that nobody writes."""
    os.mkfifo(tmp_path / "config.yaml")
    code = f"""
from pathlib import Path
from cluster.commands.compare.machines.process import Process
process = Process("run", {str(tmp_path / "config.yaml")!r}, log=Path({str(tmp_path / "log")!r}))
print(process._process.pid, flush=True)
process.wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("launcher", "given", "missing", "said"),
    [
        (
            "local",
            "asha",
            None,
            r"sweep = asha: is done by Ray Tune, but cluster.launcher = local .*launcher: auto or ray",
        ),
        ("auto", "asha", "ray.tune", r"sweep = asha: needs Ray with Tune, .* `pip install 'adapeft\[cluster\]'`"),
        ("ray", "climb", "ray", r"cluster.launcher = ray: needs Ray .* or set cluster.launcher: local"),
    ],
)
def test_what_ray_is_missing_for(config, monkeypatch, launcher, given, missing, said):
    def imported(name):
        assert name == missing
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(opening, "import_module", imported)
    loaded = load_config(config, ["workers=1", f"launcher={launcher}"])
    with pytest.raises(AdapeftError, match=said):
        opening.is_on_ray(loaded, settings(f"sweep={given}"))


@pytest.mark.parametrize(("workers", "launcher"), [(1, "auto"), (2, "local")])
def test_without_ray_runs_are_executed_on_this_machine(config, workers, launcher):
    assert not opening.is_on_ray(load_config(config, [f"workers={workers}", f"launcher={launcher}"]), settings())
