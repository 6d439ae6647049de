"""Ray: start or join a cluster, run a rank function on its workers, carry their events back."""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.queue import Empty, Queue

from adapeft.config import Cluster, Config
from adapeft.errors import AdapeftError
from cluster.events import Report
from cluster.run_folder import RunFolder

RankFunction = Callable[..., dict[str, Any]]
"""``(config, report, **arguments) → result``; imports no Ray."""

_EVENT_INTERVAL = 0.2


@contextmanager
def ray_session(cluster: Cluster) -> Iterator[None]:
    """A connection to the cluster of ``RAY_ADDRESS``, or a local one for the length of the block.

    Raises:
        AdapeftError: the cluster lacks what the config asks for, also after ``cluster.resource_timeout`` seconds.
    """
    # Worker output goes to files in the run's folder: the terminal is for progress.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        runtime_env={"env_vars": _worker_environment(cluster)},
    )
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        _wait_for_resources(cluster)
        yield
    finally:
        ray.shutdown()


def run_on_workers(
    function: RankFunction, config: Config, stage: str, watch: Report, **arguments: Any
) -> dict[str, Any]:
    """Runs ``function`` on ``cluster.workers`` workers and returns rank 0's result.

    Args:
        function: what each rank does.
        config: given to it.
        stage: names the logs.
        watch: called in this process with every event of rank 0.
        arguments: further keyword arguments of ``function``.

    Raises:
        AdapeftError: a rank raised one.
        RuntimeError: a rank failed otherwise; the message has the first cause and where the logs are.
    """
    folder = RunFolder.of(config)
    events = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _on_rank,
        train_loop_config={
            "function": function,
            "config": config,
            "arguments": arguments,
            "events": events,
            "log": str(folder.logs / stage),
        },
        scaling_config=_scaling(config.cluster),
        torch_config=TorchConfig(backend="nccl" if config.cluster.gpus_per_worker else "gloo"),
        # A name used again would resume the old run: resuming is the rank function's own business.
        run_config=RunConfig(name=f"{stage}-{uuid.uuid4().hex[:8]}", storage_path=_storage(config)),
    )
    result: dict[str, Any] = {}
    with ThreadPoolExecutor(max_workers=1) as pool:
        fit = pool.submit(trainer.fit)
        while not fit.done() or not events.empty():
            try:
                event = events.get(timeout=0.5)
            except Empty:
                continue
            if "result" in event:
                result = event["result"]
            else:
                watch({"stage": stage, **event})
        try:
            fit.result()
        except TrainingFailedError as error:
            raise _cause(error, folder.logs) from error
        finally:
            events.shutdown()
    return result


def _on_rank(loop: dict[str, Any]) -> None:
    context = ray.train.get_context()
    rank = context.get_world_rank()
    with _output_to(Path(f"{loop['log']}-rank-{rank}.log")):
        report = _reporter(loop["events"]) if rank == 0 else (lambda event: None)
        result = loop["function"](loop["config"], report, **loop["arguments"])
        if rank == 0:
            loop["events"].put({"result": result})


def _reporter(events: Queue) -> Report:
    """Puts events on the queue; of a step's many counts only as many as an eye can follow."""
    last: dict[str, Any] = {"step": None, "time": 0.0}

    def report(event: dict[str, Any]) -> None:
        is_count = "done" in event and "loss" not in event and event["done"] < event["total"]
        now = time.monotonic()
        if is_count and event["step"] == last["step"] and now - last["time"] < _EVENT_INTERVAL:
            return
        last.update(step=event["step"], time=now)
        events.put(event)

    return report


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends this process's standard output and error to a file, those of C libraries too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        saved = [os.dup(1), os.dup(2)]
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


def _scaling(cluster: Cluster) -> ScalingConfig:
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return ScalingConfig(
        num_workers=cluster.workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=resources
    )


def _storage(config: Config) -> str:
    return config.cluster.storage_path or str(RunFolder.of(config).logs / "ray")


def _worker_environment(cluster: Cluster) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker), "TOKENIZERS_PARALLELISM": "false"}
    if not cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _wait_for_resources(cluster: Cluster) -> None:
    """Waits for workers that may still be joining, then says what is missing."""
    wanted = {"CPU": cluster.workers * cluster.cpus_per_worker, "GPU": cluster.workers * cluster.gpus_per_worker}
    deadline = time.monotonic() + cluster.resource_timeout
    while True:
        there = ray.cluster_resources()
        missing = {name: amount for name, amount in wanted.items() if there.get(name, 0) < amount}
        if not missing:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic()) + 0.01))
    lacks = " and ".join(f"{amount:g} {name}s ({there.get(name, 0):g} there)" for name, amount in missing.items())
    raise AdapeftError(
        f"cluster.workers = {cluster.workers}: the cluster lacks {lacks} after {cluster.resource_timeout:g} s. Lower "
        f"cluster.workers, cpus_per_worker or gpus_per_worker, add machines, or raise cluster.resource_timeout."
    )


def _cause(error: TrainingFailedError, logs: Path) -> Exception:
    """The user's error that a rank raised, else the first failure and where to read on."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for _, failure in sorted(failures.items()):
        seen: BaseException | None = failure
        while seen is not None:
            inner = getattr(seen, "_base_exc", None) or getattr(seen, "cause", None)
            if isinstance(seen, AdapeftError):
                return AdapeftError(str(seen))
            if isinstance(inner, AdapeftError):
                return AdapeftError(str(inner))
            seen = seen.__cause__
    lines = str(error).strip().splitlines()
    return RuntimeError(f"a worker failed: {lines[-1] if lines else error}\nIts output is in {logs}.")
