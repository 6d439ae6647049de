"""The interface of launchers, which start workers and run stages on them."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Protocol, Self

from adapeft.config.config import Config
from adapeft.errors import AdapeftError
from adapeft.sections.cluster import Cluster
from cluster.events import Report
from cluster.launch.stage import RankFunction, Stage
from cluster.output.folder import RunFolder


class Publisher(Protocol):
    """Publishes the figures of a run to the monitoring of the cluster."""

    def __call__(self, event: dict[str, Any]) -> None:
        """Publish the figures of an event of rank 0."""

    def record(self, content: dict[str, Any]) -> None:
        """Publish the content of ``metrics.json``."""


class Outcome:
    """Outcome of a stage, collected from the events of its workers.

    Attributes:
        result: result of rank 0.
        ended: ranks that have ended the stage.
    """

    def __init__(self, watch: Report) -> None:
        self._watch = watch
        self._refused: str | None = None
        self.result: dict[str, Any] = {}
        self.ended: set[int] = set()

    def take(self, event: dict[str, Any]) -> None:
        """Process an event of ``Stage.run``; progress events are passed to ``watch``."""
        if "ended" in event:
            self.ended.add(event["ended"])
        elif "result" in event:
            self.result = event["result"]
        elif "refused" in event:
            self._refused = self._refused or event["refused"]
        else:
            self._watch(event)

    def check_not_refused(self) -> None:
        """Raise the first ``AdapeftError`` that a rank has reported, if any."""
        if self._refused is not None:
            raise AdapeftError(self._refused)


class Workers(ABC):
    """A group of workers that run one stage after another.

    Attributes:
        cluster: section that the workers were started for.
    """

    cluster: Cluster

    @abstractmethod
    def run(self, stage: Stage, watch: Report) -> dict[str, Any]:
        """Run the stage on all workers and return the result of rank 0."""

    @abstractmethod
    def close(self, *, is_idle: bool) -> None:
        """End the workers.

        Args:
            is_idle: whether the workers are waiting for a stage and can exit by themselves.
        """


class Launcher(ABC):
    """Context manager that starts workers. One group of workers runs all stages of a run.

    The group is started with the first stage and kept, since importing the libraries takes each worker about ten
    seconds of processor time. It is replaced after a failure, or when a stage has another ``cluster`` section.

    Args:
        cluster: number, resources and settings of the workers.
        run_id: identity of the run in logs and metrics.
    """

    def __init__(self, cluster: Cluster, run_id: str) -> None:
        self.cluster, self.run_id = cluster, run_id
        self._workers: Workers | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(is_idle=error is None)

    @abstractmethod
    def room(self) -> int:
        """Return the number of workers that the available resources allow, at most ``cluster.workers``.

        Raises:
            AdapeftError: the resources do not suffice for the minimum number of workers; the message lists what is
                missing.
        """

    def run(
        self, function: RankFunction, config: Config, name: str, watch: Report, *, puts: bool = True, **arguments: Any
    ) -> dict[str, Any]:
        """Run ``function`` on ``config.cluster.workers`` workers and return the result of rank 0.

        Args:
            function: function to call on every rank.
            config: first argument of ``function``.
            name: name of the stage, used in the names of the logs.
            watch: callback in this process for every event of rank 0.
            puts: whether to upload files that the ranks write in the run folder to the output URL.
            arguments: keyword arguments of ``function``.

        Raises:
            AdapeftError: a rank raised an ``AdapeftError``.
            WorkerError: a rank raised another exception, or was lost.
        """
        folder = RunFolder.of(config)
        folder.logs.mkdir(parents=True, exist_ok=True)
        mark = folder.logs / f".{name}-{uuid.uuid4().hex[:8]}"
        mark.touch()
        try:
            stage = Stage(name, function, config, arguments, self.run_id, mark.name, puts)
            return self._run(stage, lambda event: watch({"stage": name, **event}))
        except BaseException:
            self._close(is_idle=False)
            raise
        finally:
            mark.unlink(missing_ok=True)

    def metrics(self, config: Config) -> Publisher | None:
        """Return the publisher of the run's figures, or None if nothing collects them."""
        return None

    @abstractmethod
    def _start(self, config: Config, watch: Report) -> Workers:
        """Start the workers that ``config.cluster`` describes."""

    def _run(self, stage: Stage, watch: Report) -> dict[str, Any]:
        if self._workers is not None and self._workers.cluster != stage.config.cluster:
            self._close(is_idle=True)
        if self._workers is None:
            self._workers = self._start(stage.config, watch)
        return self._workers.run(stage, watch)

    def _close(self, *, is_idle: bool) -> None:
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close(is_idle=is_idle)
