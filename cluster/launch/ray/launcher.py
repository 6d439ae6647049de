"""Workers on Ray: one Ray Train run, whose workers run one stage after another."""

from __future__ import annotations

import itertools
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import cloudpickle
import ray
from ray.exceptions import RayActorError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adapeft.config.config import Config
from adapeft.sections.cluster import Cluster
from cluster.events import Report
from cluster.launch.cause import Failure, worker_error
from cluster.launch.launcher import Launcher, Outcome, Workers
from cluster.launch.ray.board import Board
from cluster.launch.ray.connection import connect, room_for
from cluster.launch.ray.metrics import Metrics
from cluster.launch.resources import missing, per_worker
from cluster.launch.stage import Stage
from cluster.output.folder import RunFolder

_POLL_SECONDS = 0.5


class RayLauncher(Launcher):
    """Launcher on the cluster at ``RAY_ADDRESS``, or on a local one for the duration of the context.

    Args:
        cluster: number, resources and settings of the workers.
        metadata: metadata of this run in the cluster's list of jobs, among them its identity as ``run``.

    Raises:
        AdapeftError: no cluster answers at ``RAY_ADDRESS``.
    """

    def __init__(self, cluster: Cluster, metadata: Mapping[str, str]) -> None:
        super().__init__(cluster, metadata["run"])
        connect(cluster, metadata)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            ray.shutdown()

    def room(self) -> int:
        return room_for(self.cluster)

    def metrics(self, config: Config) -> Metrics:
        return Metrics(config, self.run_id)

    def _start(self, config: Config, watch: Report) -> Workers:
        if missing(config.cluster, ray.available_resources()):
            watch({"step": "waiting for resources that others use"})
        return _TrainWorkers(config)


class _TrainWorkers(Workers):
    """Workers of one Ray Train run."""

    def __init__(self, config: Config) -> None:
        self.cluster = config.cluster
        self._logs = RunFolder.of(config).logs
        # On the node of this process: another node could be lost, and with it the board and the cause of the failure.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board: Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        # A reused name would resume the old run, but the rank functions themselves resume.
        self._run_config = RunConfig(
            name=f"workers-{uuid.uuid4().hex[:8]}",
            storage_path=str(self._logs / "ray"),
            # Otherwise Ray's controller would restart forever, waiting for the CPUs that its first attempt still holds.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        )
        trainer = TorchTrainer(
            _serve,
            train_loop_config={"board": self._board},
            scaling_config=ScalingConfig(
                num_workers=self.cluster.workers,
                use_gpu=bool(self.cluster.gpus_per_worker),
                resources_per_worker=per_worker(self.cluster),
            ),
            torch_config=TorchConfig(
                backend="nccl" if self.cluster.gpus_per_worker else "gloo", timeout_s=self.cluster.collective_timeout
            ),
            run_config=self._run_config,
        )
        self._fit = _in_background(trainer.fit)

    def run(self, stage: Stage, watch: Report) -> dict[str, Any]:
        ray.get(self._board.post.remote(cloudpickle.dumps(stage)))
        outcome = Outcome(watch)
        while len(outcome.ended) < self.cluster.workers:
            is_over = self._fit.done()
            events = ray.get(self._board.events.remote(0.0 if is_over else _POLL_SECONDS))
            for event in events:
                outcome.take(event)
            if is_over and not events:
                break
        else:
            return outcome.result
        outcome.check_not_refused()
        try:
            self._fit.result()
        except TrainingFailedError as error:
            raise worker_error(_failures(error), self._logs) from error
        raise AssertionError(f"the workers ended before stage {stage.name} did")

    def close(self, *, is_idle: bool) -> None:
        if is_idle:
            ray.get(self._board.post.remote(None))
            self._fit.exception()
        if self._fit.done():
            _tidy(self._run_config)
        ray.kill(self._board)


def _serve(loop: dict[str, Any]) -> None:
    """Run stages on a worker until the board returns None."""
    rank, machine = ray.train.get_context().get_world_rank(), ray.get_runtime_context().get_node_id()
    board = loop["board"]
    for number in itertools.count():
        stage = ray.get(board.stage.remote(number))
        if stage is None:
            return
        cloudpickle.loads(stage).run(rank, machine, lambda event: ray.get(board.tell.remote(event)))


def _in_background(call: Callable[[], Any]) -> Future[Any]:
    """Run ``call`` in a daemon thread, so that Ctrl-C exits without waiting for it."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _tidy(run: RunConfig) -> None:
    """Remove Ray Train's files of a run, which are not used for resuming."""
    root = Path(str(run.storage_path))
    shutil.rmtree(root / str(run.name), ignore_errors=True)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


def _failures(error: TrainingFailedError) -> list[Failure]:
    """Return the failures of the ranks that failed, by ascending rank."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    causes = [_innermost(failure) for _, failure in sorted(failures.items())] or [_innermost(error)]
    return [Failure(type(cause).__name__, str(cause), isinstance(cause, RayActorError)) for cause in causes]


def _innermost(failure: BaseException) -> BaseException:
    """Return the exception of a rank function without Ray's wrappers around it."""
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
