"""Ray: start or join a cluster, run a rank function on its workers, carry their events back."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayActorError
from ray.job_config import JobConfig
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adapeft.config.config import Config
from adapeft.errors import AdapeftError
from adapeft.sections.cluster import Cluster
from cluster.events import Report
from cluster.failure import WorkerError
from cluster.launch.copies import Look, run_copy
from cluster.output.folder import RunFolder
from cluster.output.identity import run_id
from cluster.output.log import rank_log

RankFunction = Callable[..., dict[str, Any]]
"""``(config, report, **arguments) → result``; imports no Ray."""

_EVENT_INTERVAL = 0.2

_LOCAL = "local"


@contextmanager
def ray_session(cluster: Cluster, metadata: Mapping[str, str] | None = None) -> Iterator[int]:
    """A connection to the cluster of ``RAY_ADDRESS``, or a local one for the length of the block.

    Gives the number of workers that there is room for, of those that ``cluster`` asks for.

    Args:
        cluster: what is wanted of it.
        metadata: what its list of jobs says of this one.

    Raises:
        AdapeftError: nothing answers at ``RAY_ADDRESS``, or the cluster lacks what the config asks for.
    """
    _connect(cluster, metadata or {})
    try:
        yield room_for(cluster)
    finally:
        ray.shutdown()


def room_for(cluster: Cluster) -> int:
    """The number of workers that there is room for, of those that ``cluster`` asks for.

    Raises:
        AdapeftError: for fewer than there may be; it says what is missing.
    """
    # To a cluster machines may still be on their way; nothing will join this process's own.
    return _wait_for_resources(cluster, 0.0 if _address() == _LOCAL else cluster.resource_timeout)


def run_on_workers(
    function: RankFunction, config: Config, stage: str, watch: Report, *, puts: bool = True, **arguments: Any
) -> dict[str, Any]:
    """Runs ``function`` on ``cluster.workers`` workers and returns rank 0's result.

    Args:
        function: what each rank does.
        config: given to it.
        stage: names the logs.
        watch: called in this process with every event of rank 0.
        puts: whether what the ranks write in the run's folder goes to its URL.
        arguments: further keyword arguments of ``function``.

    Raises:
        AdapeftError: a rank raised one.
        WorkerError: a rank failed otherwise, or was lost.
    """
    folder = RunFolder.of(config)
    folder.logs.mkdir(parents=True, exist_ok=True)
    mark = folder.logs / f".{stage}-{uuid.uuid4().hex[:8]}"
    mark.touch()
    # Beside this process: on another machine it would go with that machine, and the cause with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    # A name used again would resume the old run: resuming is the rank function's own business.
    run = RunConfig(
        name=f"{stage}-{uuid.uuid4().hex[:8]}",
        storage_path=str(folder.logs / "ray"),
        # Ray's controller would start over for ever, and wait for the very processors that its first try still holds.
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
    )
    trainer = TorchTrainer(
        _on_rank,
        train_loop_config={
            "function": function,
            "config": config,
            "arguments": arguments,
            "events": events,
            "mark": mark.name,
            "puts": puts,
            "run": run_id(config),
            "stage": stage,
        },
        scaling_config=_scaling(config.cluster),
        torch_config=TorchConfig(
            backend="nccl" if config.cluster.gpus_per_worker else "gloo", timeout_s=config.cluster.collective_timeout
        ),
        run_config=run,
    )
    result: dict[str, Any] = {}
    refused: str | None = None
    if _missing(config.cluster, ray.available_resources()):
        watch({"stage": stage, "step": "waiting for workers that others use"})
    fit = _in_background(trainer.fit)
    try:
        while not fit.done() or not events.empty():
            try:
                event = events.get(timeout=0.5)
            except Empty:
                continue
            if "result" in event:
                result = event["result"]
            elif "refused" in event:
                refused = refused or event["refused"]
            else:
                watch({"stage": stage, **event})
        fit.result()
    except TrainingFailedError as error:
        if refused is not None:
            raise AdapeftError(refused) from error
        raise _cause(error, folder.logs) from error
    finally:
        mark.unlink(missing_ok=True)
        _tidy(run)
        events.shutdown(force=True)
    return result


def _address() -> str:
    # Not "auto": that would join the local cluster of whatever else runs on this machine, and wait for its workers.
    return os.environ.get("RAY_ADDRESS", _LOCAL)


def _connect(cluster: Cluster, metadata: Mapping[str, str]) -> None:
    """Joins the cluster of ``RAY_ADDRESS`` or starts a local one."""
    # Ray would set CUDA_VISIBLE_DEVICES="" for workers without a GPU, and warns that it soon will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default of 15 lets every other process go first: next to two busy ones, a tiny run took 13 minutes to load.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # In a job Ray refuses to start when the job's environment sets a variable that the workers' sets too.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    # Ray Train's advice on its own version goes to the terminal otherwise.
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {
        # Worker output goes to files in the run's folder: the terminal is for progress.
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": _worker_environment(cluster)},
        "job_config": JobConfig(metadata=dict(metadata)),
    }
    address = _address()
    _check_answers(address, cluster.resource_timeout)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, AuthenticationError) as error:
        raise AdapeftError(
            f"RAY_ADDRESS = {address}: the cluster there does not let this process in. Give it the cluster's token "
            f"(RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS to use this "
            f"machine alone."
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise AdapeftError(
            f"RAY_ADDRESS = {address}: the cluster there runs other versions: {error}\nInstall those of the cluster "
            "here, or send the run there with `adapeft submit`."
        ) from error
    except Exception as error:
        # Ray has no class for it. Seen on two cores under a load of 20.
        if "timed out during startup" not in str(error):
            raise
        raise WorkerError(
            f"Ray did not start on this machine in time: {error} Run the command again when the machine is "
            f"less busy; what is finished is kept."
        ) from error


def _check_answers(address: str, timeout: float) -> None:
    """Knocks at ``host:port``: Ray itself would try for minutes and fill the terminal with it."""
    if address.startswith(("http://", "https://")):
        raise AdapeftError(
            f"RAY_ADDRESS = {address}: is a dashboard, to which `adapeft submit` sends runs. To join the cluster from "
            "one of its machines write HOST:6379."
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto" or "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout).close()
    except OSError as error:
        raise AdapeftError(
            f"RAY_ADDRESS = {address}: no cluster answers there ({error}). Start one with `ray start --head`, or unset "
            f"RAY_ADDRESS to use this machine alone."
        ) from error


def _in_background(call: Callable[[], Any]) -> Future[Any]:
    """Calls in a daemon thread, which whoever presses Ctrl-C need not wait for."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _on_rank(loop: dict[str, Any]) -> None:
    try:
        _work(loop)
    except AdapeftError as error:
        # Told at once: the other ranks lose this one, and Ray may see only their failure.
        loop["events"].put({"refused": str(error)})
        # Ray's controller waits forever for an error that cannot be unpickled from its message alone.
        raise AdapeftError(str(error)) from None


def _work(loop: dict[str, Any]) -> None:
    context = ray.train.get_context()
    rank = context.get_world_rank()
    config, stage, run = loop["config"], loop["stage"], loop["run"]
    log = RunFolder.of(config).logs / f"{stage}-rank-{rank}"
    with (
        run_copy(config, loop["mark"], ray.get_runtime_context().get_node_id(), puts=loop["puts"]) as look,
        _output_to(log.with_suffix(".log")),
        rank_log(log.with_suffix(".jsonl"), run, stage, rank),
    ):
        report = _reporter(loop["events"], look) if rank == 0 else (lambda event: None)
        result = loop["function"](config, report, **loop["arguments"])
        if rank == 0:
            loop["events"].put({"result": result})


def _reporter(events: Queue, look: Look) -> Report:
    """Puts events on the queue; of a step's many counts only as many as an eye can follow."""
    last: dict[str, Any] = {"step": None, "time": 0.0}

    def report(event: dict[str, Any]) -> None:
        is_count = "done" in event and "loss" not in event and event["done"] < event["total"]
        now = time.monotonic()
        if is_count and event["step"] == last["step"] and now - last["time"] < _EVENT_INTERVAL:
            return
        last.update(step=event["step"], time=now)
        events.put(event)
        look()

    return report


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends this process's standard output and error to a file, those of C libraries and the last traceback too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        saved = [os.dup(1), os.dup(2)]
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException:
            traceback.print_exc(file=file)
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


def _scaling(cluster: Cluster) -> ScalingConfig:
    return ScalingConfig(
        num_workers=cluster.workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=_for_a_worker(cluster)
    )


def _tidy(run: RunConfig) -> None:
    """Removes what Ray Train kept of a run: nothing resumes from it."""
    root = Path(str(run.storage_path))
    shutil.rmtree(root / str(run.name), ignore_errors=True)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


def _worker_environment(cluster: Cluster) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(cluster.cpus_per_worker), "TOKENIZERS_PARALLELISM": "false"}
    if not cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _wait_for_resources(cluster: Cluster, timeout: float) -> int:
    """Waits for workers that may still be joining, and asks an autoscaler for them; how many there is room for."""
    deadline = time.monotonic() + timeout
    missing = _missing(cluster, there := ray.cluster_resources())
    with _demand(cluster) if missing and timeout else nullcontext():
        while missing and time.monotonic() < deadline:
            time.sleep(min(1.0, deadline - time.monotonic() + 0.01))
            missing = _missing(cluster, there := ray.cluster_resources())
    if not missing:
        return cluster.workers
    room = min(int(there.get(name, 0) // amount) for name, amount in _for_a_worker(cluster).items())
    if room >= cluster.fewest:
        return room
    missing = _missing(cluster.with_workers(cluster.fewest), there)
    lacks = " and ".join(f"{amount:g} {name}s ({there.get(name, 0):g} there)" for name, amount in missing.items())
    key = "cluster.min_workers" if cluster.min_workers else "cluster.workers"
    waited = f" after {timeout:g} s" if timeout else ""
    longer = ", or raise cluster.resource_timeout" if timeout else ""
    raise AdapeftError(
        f"{key} = {cluster.fewest}: the cluster has too little{waited}; wanted are {lacks}. Lower "
        f"{key}, cluster.cpus_per_worker or cluster.gpus_per_worker, or add machines{longer}."
    )


@contextmanager
def _demand(cluster: Cluster) -> Iterator[None]:
    """Lets an autoscaler see what is wanted, for as long as the block lasts.

    What ``ray.autoscaler.sdk.request_resources`` asks for would outlive this process, and keep idle machines running.
    """
    group = placement_group([_for_a_worker(cluster)] * cluster.workers)
    try:
        yield
    finally:
        remove_placement_group(group)


def _for_a_worker(cluster: Cluster) -> dict[str, float]:
    gpus: dict[str, float] = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    return {"CPU": cluster.cpus_per_worker, **gpus}


def _missing(cluster: Cluster, there: dict[str, float]) -> dict[str, float]:
    """What the workers want of each resource of which there is less."""
    wanted = {name: cluster.workers * amount for name, amount in _for_a_worker(cluster).items()}
    return {name: amount for name, amount in wanted.items() if there.get(name, 0) < amount}


def _cause(error: TrainingFailedError, logs: Path) -> Exception:
    """The first rank's failure and where to read on."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    causes = [_innermost(failure) for _, failure in sorted(failures.items())] or [_innermost(error)]
    for cause in causes:
        if "device-side assert" in str(cause):  # an index out of range, seen only when the GPU got to it
            return AdapeftError(
                "the model was given an index that one of its tables does not have: a token, a position or a class. "
                f"Check that tokenizer, data.max_length and classes belong to the model. More in {logs}."
            )
    lost = [cause for cause in causes if isinstance(cause, RayActorError)]
    first = (lost or causes)[0]
    lines = str(first).strip().splitlines()
    message = f"a worker failed: {type(first).__name__}: {lines[0] if lines else ''}\nMore in {logs}."
    # The others see their connection go, at times before Ray sees the process go.
    if lost or all("closed by peer" in str(cause) or "reset by peer" in str(cause) for cause in causes):
        message += "\nIts process or machine is gone; the same command goes on from what was saved."
    return WorkerError(message)


def _innermost(failure: BaseException) -> BaseException:
    """What a rank function raised, out of the wrappers that Ray puts around it."""
    while True:
        inner = (
            getattr(failure, "_base_exc", None)
            or getattr(failure, "cause", None)
            or getattr(failure, "health_check_failure", None)
            or getattr(failure, "controller_failure", None)
        )
        if not isinstance(inner, BaseException):
            return failure
        failure = inner
