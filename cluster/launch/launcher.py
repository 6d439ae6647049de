"""The interface of a launcher: whatever starts workers and has them run the stages of a run."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Protocol, Self

from adapeft.config.config import Config
from cluster.events import Report
from cluster.launch.stage import RankFunction, Stage
from cluster.output.folder import RunFolder


class Publisher(Protocol):
    """Publishes a run's figures to whoever watches the cluster."""

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes an event of rank 0."""

    def record(self, content: dict[str, Any]) -> None:
        """Takes what ``metrics.json`` holds."""


class Launcher(ABC):
    """A context in which workers can be started. One group of them serves all stages of a run.

    The group starts with the first stage, since libraries take every worker about ten seconds of processor time, and
    is replaced after a failure or for another ``cluster`` section.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(is_idle=error is None)

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
            self.close(is_idle=False)
            raise
        finally:
            mark.unlink(missing_ok=True)

    def metrics(self, config: Config) -> Publisher | None:
        """What publishes the run's figures; None where nothing collects them."""
        return None

    @abstractmethod
    def close(self, *, is_idle: bool) -> None:
        """Ends the workers, if there are any.

        Args:
            is_idle: whether they wait for a stage, so that they can end by themselves.
        """

    @abstractmethod
    def _run(self, stage: Stage, watch: Report) -> dict[str, Any]:
        """See ``run``."""
