"""A run reports to its trackers from the launching process, continues there, and survives their failures."""

from __future__ import annotations

import json
import struct
import threading
import time
from pathlib import Path
from typing import get_args

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adapeft.config.load import parse_config
from adapeft.errors import AdapeftError
from adapeft.sections.train import Tracker
from cluster.output.folder import RunFolder
from cluster.output.identity import run_id
from cluster.tracking import trackers
from cluster.tracking.trackers import TRACKERS, Trackers

TRAINING = {"step": "training", "stage": "train", "done": 10, "total": 20, "loss": 1.5, "lr": 1e-3}
EVALUATED = {"step": "evaluated", "stage": "train", "at": 12, "metric": "accuracy", "loss": 0.5, "accuracy": 0.75}
METRICS = {
    "choice": {"value": 0.25, "bound": 0.5, "gap": None, "budget": 1000, "reach": float("inf"), "method": "adapeft"},
    "trainable_parameters": 990,
    "seconds": {"select": 1.0},
}
RESULT = {"after": {"loss": 0.5, "accuracy": 0.75}, "best_step": 12, "delta_bytes": 4096, "peak_memory_bytes": 1}
SENT = {
    ("choice/influence", 0, 0.25),
    ("choice/bound", 0, 0.5),
    ("choice/budget", 0, 1000.0),
    ("choice/trainable_parameters", 0, 990.0),
    ("train/loss", 10, 1.5),
    ("train/learning_rate", 10, 1e-3),
    ("evaluation/loss", 12, 0.5),
    ("evaluation/accuracy", 12, 0.75),
    ("result/loss", 12, 0.5),
    ("result/accuracy", 12, 0.75),
    ("result/delta_bytes", 12, 4096.0),
    ("result/peak_memory_bytes", 12, 1.0),
}


class Fake:
    """A tracker that keeps what it is sent, and fails or waits when told to."""

    def __init__(self, name="fake-1", fails=(), waits=None):
        self.name, self.fails, self.waits = name, fails, waits
        self.run, self.sent, self.ended, self.calls, self.threads = None, set(), None, [], set()

    def start(self, run):
        self._call("start")
        self.run = run
        return run.known or self.name

    def log(self, values, step):
        if self.waits is not None:
            self.waits.wait(10)
        self._call("log")
        self.sent |= {(name, step, value) for name, value in values.items()}

    def finish(self, *, failed):
        self._call("finish")
        self.ended = failed

    def _call(self, name):
        self.calls.append(name)
        self.threads.add(threading.get_ident())
        if name in self.fails:
            raise RuntimeError(f"{name} is out of order.")


def config_of(tmp_path, *names, **sections):
    (tmp_path / "run" / "logs").mkdir(parents=True, exist_ok=True)
    content = {
        "model": {"name": "base", "task": "causal-lm"},
        "data": {"train": "train.txt", "evaluation": "validation.txt"},
        "output": str(tmp_path / "run"),
        "train": {
            "learning_rate": 1e-3,
            "report_to": list(names),
            "subset": "https://me:secret@host/a.safetensors?signature=hidden",
        },
    }
    return parse_config(content | sections)


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Return a function that opens trackers, of which given ones replace those of the registry."""
    failures = []

    def open_trackers(**fakes):
        monkeypatch.setattr(trackers, "_check_installed", lambda names: None)
        for name, fake in fakes.items():
            monkeypatch.setitem(TRACKERS, name, lambda fake=fake: fake)
        config = config_of(tmp_path, *fakes)
        return Trackers(config, run_id(config), RunFolder.of(config), lambda *failure: failures.append(failure))

    open_trackers.failures = failures
    open_trackers.record = lambda: json.loads((tmp_path / "run" / "tracking.json").read_text())
    return open_trackers


def report(tracked: Trackers) -> None:
    """Report a run."""
    tracked.record(METRICS)
    tracked({"step": "loading model and data", "stage": "train"})
    tracked(TRAINING)
    tracked(EVALUATED)
    tracked.record(METRICS | RESULT)


def test_every_name_of_the_config_has_a_tracker():
    assert set(TRACKERS) == set(get_args(Tracker))


def test_figures_config_and_run_id_arrive_and_secrets_do_not(opened, tmp_path):
    fake = Fake()
    tracked = opened(wandb=fake)
    report(tracked)
    tracked.close(failed=False)
    assert fake.sent == SENT
    assert fake.ended is False
    assert fake.run.name == run_id(config_of(tmp_path, "wandb"))
    assert fake.run.config["train.report_to"] == ["wandb"]
    assert fake.run.config["train.subset"] == "https://me:…@host/a.safetensors?…"
    assert opened.record() == {"wandb": {"id": "fake-1"}}
    assert len(fake.threads) == 1, "MLflow's active run belongs to a thread"
    assert threading.get_ident() not in fake.threads
    assert not opened.failures


def test_a_later_command_continues_the_run(opened):
    opened(wandb=Fake("the-first")).close(failed=True)
    again = Fake("another")
    opened(wandb=again).close(failed=False)
    assert again.run.known == "the-first"
    assert opened.record() == {"wandb": {"id": "the-first"}}


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(opened):
    failing, well = Fake(fails=("log",)), Fake()
    tracked = opened(wandb=failing, mlflow=well)
    report(tracked)
    tracked.close(failed=False)
    assert opened.failures == [("wandb", "RuntimeError: log is out of order")]
    assert opened.record()["wandb"] == {"id": "fake-1", "failed": "RuntimeError: log is out of order"}
    assert "failed" not in opened.record()["mlflow"]
    assert well.sent == SENT
    assert (failing.calls.count("log"), failing.ended, well.ended) == (1, True, False)


def test_a_failure_at_the_end_is_reported(opened):
    opened(wandb=Fake(fails=("finish",))).close(failed=False)
    assert opened.failures == [("wandb", "RuntimeError: finish is out of order")]


def test_a_slow_tracker_delays_neither_the_training_nor_an_interrupt(opened, monkeypatch):
    monkeypatch.setattr(trackers, "_INTERRUPT_SECONDS", 0.05)
    released = threading.Event()
    slow = Fake(waits=released)
    tracked = opened(wandb=slow)
    started = time.perf_counter()
    report(tracked)
    tracked.close(failed=True, interrupted=True)
    assert time.perf_counter() - started < 5
    assert not slow.sent
    released.set()


def test_a_tracker_that_does_not_start_is_an_error_and_the_others_end(opened):
    first = Fake()
    with pytest.raises(AdapeftError, match=r"train\.report_to: mlflow does not start: RuntimeError: start is out of"):
        opened(wandb=first, mlflow=Fake(fails=("start",)))
    assert first.ended is True
    opened(wandb=Fake("the-first")).close(failed=False)
    with pytest.raises(AdapeftError, match=r"does not start with the run 'the-first' that .*tracking\.json names"):
        opened(wandb=Fake(fails=("start",)))


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else object())
    config = config_of(tmp_path, "tensorboard", "mlflow")
    with pytest.raises(AdapeftError, match=r"mlflow is not installed\. Run `pip install 'adapeft\[tracking\]'`, or"):
        Trackers(config, run_id(config), RunFolder.of(config), print)
    assert not list((tmp_path / "run" / "logs").iterdir()), "found out before anything is written"


def test_a_damaged_record_is_named(opened, tmp_path):
    opened(wandb=Fake()).close(failed=False)
    (tmp_path / "run" / "tracking.json").write_text('{"wandb": 3}')
    with pytest.raises(AdapeftError, match=r"tracking\.json: damaged .* Remove it to start new runs in the trackers"):
        opened(wandb=Fake())


def real(tmp_path, name, failures, **sections):
    config = config_of(tmp_path, name, **sections)
    return Trackers(config, run_id(config), RunFolder.of(config), lambda *failure: failures.append(failure))


def test_tensorboard_writes_next_to_the_logs(tmp_path):
    for _ in range(2):
        tracked = real(tmp_path, "tensorboard", failures := [])
        report(tracked)
        tracked.close(failed=False)
        assert not failures
    logged = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    found = {(name, event.step, event.value) for name in logged.Tags()["scalars"] for event in logged.Scalars(name)}
    assert {(name, step) for name, step, _ in found} == {(name, step) for name, step, _ in SENT}
    assert dict((name, value) for name, _, value in found) == pytest.approx({name: value for name, _, value in SENT})
    (text,) = logged.Tensors("config/text_summary")
    assert b"model.name: base" in text.tensor_proto.string_val[0]
    assert b"secret" not in text.tensor_proto.string_val[0]


def test_mlflow_keeps_one_run(monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "colours")
    tracked = real(tmp_path, "mlflow", failures := [])
    report(tracked)
    tracked.close(failed=True)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("colours").experiment_id])
    assert run.info.status == "FAILED"
    assert run.info.run_name == run_id(config_of(tmp_path, "mlflow"))
    assert run.data.params["model.name"] == "base"
    assert len(run.data.params) > 40
    assert "secret" not in str(run.data.params)
    assert {(metric.key, metric.step, metric.value) for metric in run.data._metric_objs} == SENT

    # A resumed run may have another cluster section, which MLflow would refuse to change.
    tracked = real(tmp_path, "mlflow", failures, cluster={"workers": 3})
    tracked({**TRAINING, "done": 20, "loss": 0.5})
    tracked.close(failed=False)
    assert not failures
    (run,) = client.search_runs([run.info.experiment_id])
    assert run.info.status == "FINISHED"
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (10, 1.5),
        (20, 0.5),
    ]


@pytest.mark.ranks  # its service is another process
def test_wandb_writes_offline_runs_of_one_id(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "colours")
    monkeypatch.setenv("WANDB_SILENT", "true")
    failures = []
    for _ in range(2):
        tracked = real(tmp_path, "wandb", failures)
        report(tracked)
        tracked.close(failed=False)
    assert not failures
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    ids = set()
    for file in files:
        # Its service writes the last records after `finish` has returned.
        deadline = time.monotonic() + 30
        while not (records := list(records_of(file))) or not records[-1].HasField("exit"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (run,) = [record.run for record in records if record.HasField("run")]
        ids.add(run.run_id)
        assert (run.project, run.display_name) == ("colours", run_id(config_of(tmp_path, "wandb")))
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["model.name"] == "base"
        assert "secret" not in str(config)
        rows = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        found = {
            (name, row["train/global_step"], value)
            for row in rows
            for name, value in row.items()
            if not name.startswith("_") and name != "train/global_step"
        }
        assert found == SENT
    assert len(files) == 2
    assert len(ids) == 1


def records_of(path: Path):
    """Yield the records of a file of W&B, in the format of LevelDB's log: blocks of 32 KiB with split records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield Record.FromString(whole)
            whole = b""
