"""The interface of a launcher: whatever starts workers and has them run the stages of a run."""

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
    """Publishes a run's figures to whoever watches the cluster."""

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes an event of rank 0."""

    def record(self, content: dict[str, Any]) -> None:
        """Takes what ``metrics.json`` holds."""


class Outcome:
    """What a stage has come to, from the events of its workers.

    Attributes:
        result: of rank 0.
        ended: ranks that have ended the stage.
    """

    def __init__(self, watch: Report) -> None:
        self._watch = watch
        self._refused: str | None = None
        self.result: dict[str, Any] = {}
        self.ended: set[int] = set()

    def take(self, event: dict[str, Any]) -> None:
        """Takes an event, and passes on what is for whoever watches; see ``Stage.run``."""
        if "ended" in event:
            self.ended.add(event["ended"])
        elif "result" in event:
            self.result = event["result"]
        elif "refused" in event:
            self._refused = self._refused or event["refused"]
        else:
            self._watch(event)

    def check_not_refused(self) -> None:
        """Raises the ``AdapeftError`` of the first rank that raised one."""
        if self._refused is not None:
            raise AdapeftError(self._refused)


class Workers(ABC):
    """A group of workers that take stage after stage.

    Attributes:
        cluster: what was asked for.
    """

    cluster: Cluster

    @abstractmethod
    def run(self, stage: Stage, watch: Report) -> dict[str, Any]:
        """Rank 0's result of the stage."""

    @abstractmethod
    def close(self, *, is_idle: bool) -> None:
        """Ends the workers.

        Args:
            is_idle: whether they wait for a stage, so that they can end by themselves.
        """


class Launcher(ABC):
    """A context in which workers can be started. One group of them serves all stages of a run.

    The group starts with the first stage, since libraries take every worker about ten seconds of processor time, and
    is replaced after a failure or for another ``cluster`` section.

    Args:
        cluster: what is wanted of the workers.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._workers: Workers | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(is_idle=error is None)

    @abstractmethod
    def room(self) -> int:
        """The number of workers that there is room for, of those that the config asks for.

        Raises:
            AdapeftError: for fewer than there may be; it says what is missing.
        """

    def run(
        self, function: RankFunction, config: Config, name: str, watch: Report, *, puts: bool = True, **arguments: Any
    ) -> dict[str, Any]:
        """Runs ``function`` on ``config.cluster.workers`` workers and returns rank 0's result.

        Args:
            function: called on every rank.
            config: its first argument.
            name: of the stage; names the logs.
            watch: called in this process with every event of rank 0.
            puts: whether what the ranks write in the run's folder goes to its URL.
            arguments: keyword arguments of ``function``.

        Raises:
            AdapeftError: a rank raised one.
            WorkerError: a rank failed otherwise, or was lost.
        """
        folder = RunFolder.of(config)
        folder.logs.mkdir(parents=True, exist_ok=True)
        mark = folder.logs / f".{name}-{uuid.uuid4().hex[:8]}"
        mark.touch()
        try:
            stage = Stage(name, function, config, arguments, mark.name, puts)
            return self._run(stage, lambda event: watch({"stage": name, **event}))
        except BaseException:
            self._close(is_idle=False)
            raise
        finally:
            mark.unlink(missing_ok=True)

    def metrics(self, config: Config) -> Publisher | None:
        """What publishes the run's figures; None where nothing collects them."""
        return None

    @abstractmethod
    def _start(self, config: Config, watch: Report) -> Workers:
        """Starts the workers that ``config.cluster`` asks for."""

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
