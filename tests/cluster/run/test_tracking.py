"""The command reports to trackers, continues their run when it resumes, and refuses missing ones before it starts."""

from __future__ import annotations

import json

import pytest

from cluster.failure import WorkerError
from cluster.launch import opening
from cluster.tracking import trackers
from cluster.tracking.tensorboard import TensorBoard
from tests.support.checkpoints import adapeft

OPTIONS = (
    "cluster.launcher=local",
    "cluster.workers=1",
    "zero_stage=0",
    "method=random",
    "max_steps=6",
    "eval_steps=3",
)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_run_and_its_continuation_are_one_run_of_mlflow(config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    store, output = (tmp_path / "store").as_uri(), tmp_path / "run"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    options = (*OPTIONS, "train.logging_steps=1", "report_to=[mlflow]", f"output={output}")
    client, ids = mlflow.MlflowClient(store), []
    for _ in range(2):
        done = adapeft("run", config, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        (run,) = client.search_runs(["0"])
        assert run.info.status == "FINISHED"
        ids.append(run.info.run_id)
        metrics = json.loads((output / "metrics.json").read_text())
        for name in ("loss", "accuracy"):
            found = client.get_metric_history(run.info.run_id, f"evaluation/{name}")
            assert [(point.step, point.value) for point in found] == [
                (entry.get("step", 0), entry[name]) for entry in (metrics["before"], *metrics["history"])
            ]
            assert run.data.metrics[f"result/{name}"] == metrics["after"][name]
        assert run.data.metrics["choice/trainable_parameters"] == metrics["trainable_parameters"]
        assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [*range(1, 7)]
        (output / "metrics.json").unlink()  # the next command resumes after the last checkpoint
    assert ids[0] == ids[1]
    assert json.loads((output / "tracking.json").read_text()) == {"mlflow": {"id": ids[0]}}
    assert not list((output / "logs").glob("events.out.tfevents*"))


class Losing:
    """A launcher whose workers are lost after one step."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def room(self):
        return 1

    def metrics(self, config):
        return None

    def run(self, function, config, stage, watch, **arguments):
        watch({"stage": stage, "step": "training", "done": 1, "total": 6, "loss": 1.5, "lr": 0.01})
        raise WorkerError("the worker was lost")


def test_a_failed_run_is_one_in_mlflow_too_and_is_continued(command, config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setattr(opening, "open_launcher", lambda cluster, metadata: Losing())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    options = (*OPTIONS, "cluster.max_failures=0", "report_to=[mlflow]", f"output={tmp_path / 'run'}")
    client = mlflow.MlflowClient()
    for count in (1, 2):
        assert command("run", config, *options).returncode == 1
        (run,) = client.search_runs(["0"])
        assert run.info.status == "FAILED"
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == count
    chosen = json.loads((tmp_path / "run" / "metrics.json").read_text())["trainable_parameters"]
    assert run.data.metrics["choice/trainable_parameters"] == chosen


def test_a_tracker_that_fails_is_shown_and_recorded(command, config, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "open_launcher", lambda cluster, metadata: Losing())
    monkeypatch.setattr(TensorBoard, "log", lambda self, values, step: 1 / 0)
    output = tmp_path / "run"
    done = command("run", config, *OPTIONS, "cluster.max_failures=0", f"output={output}")
    said = (
        "train.report_to: tensorboard has failed and gets nothing more of this command: ZeroDivisionError: division by"
    )
    assert done.stdout.count(said) == 1
    assert "the worker was lost" in done.stderr
    events = [json.loads(line) for line in (output / "logs" / "events.jsonl").read_text().splitlines()]
    assert [event["tracker"] for event in events if event["message"] == "tracker failed"] == ["tensorboard"]
    assert "ZeroDivisionError" in json.loads((output / "tracking.json").read_text())["tensorboard"]["failed"]


def test_a_missing_package_is_refused_before_anything_runs(command, config, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    done = command("run", config, *OPTIONS, "report_to=wandb", f"output={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "pip install 'adapeft[tracking]'" in done.stderr
    assert not (tmp_path / "run" / "subset.safetensors").exists()
