"""Monitoring of a run: metrics, the dashboard that shows them, the list of jobs, and logs."""

from __future__ import annotations

import json
import re
import socket
import time
from datetime import datetime
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from ray.cluster_utils import Cluster

from adapeft.config.load import read_config
from cluster.launch.ray import metrics
from cluster.output.identity import run_id
from tests.support.checkpoints import adapeft, write_config, write_gpt2, write_text

pytestmark = pytest.mark.ray

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana" / "adapeft.json"
OVERRIDES = (
    *("cluster.workers=1", "zero_stage=1", "groups=element", "calibration=32"),
    *("max_steps=40", "eval_steps=20", "logging_steps=1"),
)


def json_of(url: str):
    """Return the answer of a dashboard, whose modules may still be loading when a short run has ended."""
    deadline = time.monotonic() + 120
    while not (response := requests.get(url, timeout=10)).ok and time.monotonic() < deadline:
        time.sleep(1)
    assert response.ok, (response.status_code, response.text)
    return response.json()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Config of a run on a cluster, the samples that its agent exports just after, and the cluster's list of jobs."""
    folder = tmp_path_factory.mktemp("seen")
    train, evaluation = write_text(folder / "train.txt", 800), write_text(folder / "validation.txt", 330)
    config = write_config(folder / "run.yaml", write_gpt2(folder / "base"), train, evaluation, task="causal-lm")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "metrics_export_port": port, "include_dashboard": True, "dashboard_port": 0},
    )
    try:
        done = adapeft("run", config, *OVERRIDES, RAY_ADDRESS=cluster.address)
        assert done.returncode == 0, done.stdout + done.stderr
        exported = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
        jobs = json_of(f"http://{cluster.webui_url}/api/jobs/")
    finally:
        cluster.shutdown()
    samples = [sample for family in text_string_to_metric_families(exported) for sample in family.samples]
    return read_config(config, list(OVERRIDES)), [each for each in samples if "adapeft_" in each.name], jobs


@pytest.mark.slow
def test_metrics_are_those_of_the_run(seen):
    config, samples, _ = seen
    found = json.loads((Path(config.output) / "metrics.json").read_text())

    def value(name: str, stage: str) -> float:
        (only,) = [
            sample.value for sample in samples if sample.name == f"ray_{name}" and sample.labels["stage"] == stage
        ]
        return only

    assert value("adapeft_evaluation_loss", "train") == pytest.approx(found["last"]["loss"], rel=1e-9)
    assert value("adapeft_gap_ratio", "choose") == pytest.approx(found["choice"]["gap"], rel=1e-9)
    assert value("adapeft_trainable_parameters", "choose") == found["trainable_parameters"]
    assert value("adapeft_memory_peak_bytes", "train") == found["peak_memory_bytes"]
    tokens = value("adapeft_throughput_tokens_per_second", "train")
    assert tokens == pytest.approx(value("adapeft_throughput_examples_per_second", "train") * config.data.max_length)
    for sample in samples:
        assert sample.labels["run"] == run_id(config)
        assert sample.labels["model"] == config.model.name
        assert sample.labels["method"] == "adapeft"


@pytest.mark.slow
def test_all_metrics_are_exported(seen):
    _, samples, _ = seen
    assert {sample.name.removeprefix("ray_") for sample in samples} == metrics.METRICS.keys()


@pytest.mark.slow
def test_the_list_of_jobs_says_which_run_it_is(seen):
    config, _, jobs = seen
    (job,) = [job for job in jobs if "run" in (job["metadata"] or {})]
    assert job["metadata"].items() >= {"run": run_id(config), "output": config.output, "budget": "20%"}.items()


@pytest.mark.slow
def test_events_are_lines_of_json(seen):
    config, _, _ = seen
    lines = [json.loads(line) for line in (Path(config.output) / "logs" / "events.jsonl").read_text().splitlines()]
    assert all(line["run"] == run_id(config) for line in lines)
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert times == sorted(times)
    assert [line["stage"] for line in lines if line["message"] == "ended"] == ["measure", "train"]
    losses = [line["loss"] for line in lines if line["message"] == "training"]
    found = json.loads((Path(config.output) / "metrics.json").read_text())
    assert len(losses) == found["num_steps"] == 40
    evaluated = [line for line in lines if line["message"] == "evaluated"]
    assert [line["loss"] for line in evaluated[1:]] == [each["loss"] for each in found["history"]]
    assert evaluated[0]["rank"] == 0


def test_the_dashboard_shows_what_is_exported():
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = [name for expression in expressions for name in re.findall(r"ray_(adapeft_\w+)", expression)]
    assert sorted(shown) == sorted(metrics.METRICS)
    assert all('{run=~"$run"}' in expression for expression in expressions)
    (variable,) = [each for each in dashboard["templating"]["list"] if each["name"] == "run"]
    assert variable["query"]["query"] == "label_values(ray_adapeft_progress_ratio, run)"


def test_an_evaluation_takes_no_time_of_training(monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    rate, rates = metrics._Rate(), []
    for seconds, event in [
        (5.0, {"step": "evaluating", "done": 1, "total": 2}),
        (1.0, {"step": "evaluating", "done": 2, "total": 2}),
        (0.0, {"step": "evaluated", "at": 0}),
        (2.0, {"step": "training", "done": 10}),
        (4.0, {"step": "training", "done": 30}),
        (7.0, {"step": "evaluating", "done": 2, "total": 2}),
        (0.0, {"step": "evaluated", "at": 30}),
        (0.01, {"step": "training", "done": 31}),  # was queued
        (0.99, {"step": "training", "done": 40}),
    ]:
        now += seconds
        rates.append(rate.after(event))
    assert rates == [None, 1.0, None, 5.0, 5.0, None, None, None, 10.0]
