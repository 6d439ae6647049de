"""The session of a command on a run: its folder, logs and terminal, and the workers once a stage needs them."""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from adapeft.config.config import Config
from adapeft.errors import AdapeftError
from adapeft.files.artifact import provenance, save_json
from adapeft.memory.estimate import memory
from adapeft.sections.paths import is_url
from cluster.events import Report, to_all
from cluster.failure import WorkerError
from cluster.inspection.estimate import estimate_of, remarks
from cluster.inspection.fits import check_memory
from cluster.inspection.inspect import inspect
from cluster.inspection.inspection import Inspection
from cluster.output.contents import contents_of
from cluster.output.folder import RunFolder
from cluster.output.identity import job_metadata, run_id
from cluster.output.log import EventLog
from cluster.output.metrics import load_metrics
from cluster.output.mirror import Mirror
from cluster.terminal.console import Terminal
from cluster.tracking.trackers import Trackers
from cluster.zero.settings import zero_of

if TYPE_CHECKING:  # torch.distributed and Ray, which a command without a stage does not need
    from cluster.launch.launcher import Launcher, Publisher


class Session:
    """One command on one run: its folder, its inspected config, and its launcher once a stage needs it.

    Args:
        config: config of the run.
        terminal: terminal that shows the progress.
        claims: whether the command writes the run's artifacts, so that the folder must belong to this config.
    """

    def __init__(self, config: Config, terminal: Terminal, *, claims: bool = True) -> None:
        self.config, self.terminal, self.claims = config, terminal, claims
        self.folder, self.run_id = RunFolder.of(config), run_id(config)
        self.inspection: Inspection
        self.contents: dict[str, str] = {}
        self._estimated: dict[str, dict[str, Any]] = {}
        self._mirror = Mirror(config.output) if is_url(config.output) else None
        self._log = EventLog(self.folder.events, self.run_id)
        self._launched: tuple[Launcher, Config, Publisher | None] | None = None
        self._trackers: Trackers | None = None
        self._lock: FileLock | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        with self.terminal.checking() as report:
            self.inspection = inspect(self.config, report)
            self.config = self.inspection.config
            if self.claims:
                self.contents = contents_of(self.config, self.inspection.description)
        if self._mirror is not None:
            with self.terminal.busy("fetching the output"):
                self._mirror.fetch()
        if self.claims:
            self._lock = self.folder.claim(self.config, self.contents)
            self._put()
            self.terminal.show_plan(self.config, self.inspection)
        else:
            self.terminal.show_inputs(self.config, self.inspection)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.folder.logs.is_dir():
            self._log.write("failed", logging.ERROR, cause=f"{type(error).__name__}: {error}")
        if self._trackers is not None:
            self._trackers.close(failed=error is not None)
        self._log.close()
        self._stack.__exit__(kind, error, trace)
        try:
            if error is None:
                self._put()
            elif self._mirror is not None and not self._mirror.has_failed:
                with suppress(AdapeftError, WorkerError):  # the first error is the one to report
                    self._sync()
        finally:
            if self._lock is not None:
                self._lock.release()

    def interrupted(self) -> None:
        """Log that the user interrupted the command, which then ends without leaving the session."""
        if self.folder.logs.is_dir():
            self._log.write("interrupted", logging.WARNING)
        if self._trackers is not None:
            self._trackers.close(failed=True, interrupted=True)

    def track(self) -> None:
        """Start the run in the trackers that the config names, or continue it there; what is known so far is sent."""
        if self._trackers is None:
            self._trackers = Trackers(self.config, self.run_id, self.folder, self._tracker_failed)
            self._put()
            self._trackers.record(self.metrics())

    def on_workers(self, function: Any, stage: str, **arguments: Any) -> dict[str, Any]:
        """Run a rank function on the config's workers, with progress on the terminal, and return its result.

        If workers fail, new ones resume from what was saved, up to ``cluster.max_failures`` times.
        """
        launcher, present, metrics = self._launched = self._launched or self._launch()
        publishers: list[Publisher] = [each for each in (metrics, self._trackers) if each is not None]
        reports: list[Report] = [self._log, *publishers, self._look]
        for failures_left in reversed(range(self.config.cluster.max_failures + 1)):
            self._log.write("started", stage=stage, workers=present.cluster.workers)
            try:
                with self.terminal.watch(stage) as watch:
                    tell = to_all(watch, *reports)
                    result = launcher.run(function, present, stage, tell, puts=self.claims, **arguments)
                break
            except WorkerError as error:
                if not failures_left:
                    raise
                self._log.write("failed", logging.WARNING, stage=stage, cause=str(error))
                self.terminal.note(f"{stage}: {error}\n{stage}: retrying with new workers, up to {failures_left} times")
                self._sync()
                present = self._with_workers(launcher.room())
                self._launched = launcher, present, metrics
        self._log.write("ended", stage=stage)
        self._sync()
        return result

    def settle(self, learning_rate: float) -> None:
        """Give the stages that follow this learning rate instead of ``train.learning_rate: auto``."""

        def settled(config: Config) -> Config:
            train = config.train.model_copy(update={"learning_rate": learning_rate})
            return config.model_copy(update={"train": train})

        self.config = settled(self.config)
        if self._launched is not None:
            launcher, present, metrics = self._launched
            self._launched = launcher, settled(present), metrics

    def check_memory(self, *, trains: bool = True) -> None:
        """See ``cluster.inspection.fits.check_memory``."""
        with self.terminal.busy("estimating memory"):
            estimate = estimate_of(self.inspection)
            check_memory(estimate, trains=trains)
            zero = zero_of(self.config.cluster)
            lines = remarks(estimate, zero)
            self._estimated = {
                stage: {"parts": memory(load, zero).parts, "is_bound": load.unknown is not None}
                for stage, load in estimate.loads(zero).items()
            }
        for line in lines:
            self.terminal.note(line)

    def metrics(self) -> dict[str, Any]:
        """Return the content of ``metrics.json`` so far."""
        return load_metrics(self.folder.metrics)

    def record(self, **metrics: Any) -> dict[str, Any]:
        """Add to ``metrics.json`` and return its content."""
        content = self.metrics()
        seconds = {**content.get("seconds", {}), **metrics.pop("seconds", {})}
        content = {**content, **metrics, "seconds": seconds, "contents": self.contents, "provenance": provenance()}
        if self._estimated:
            content["estimated_memory"] = self._estimated
        save_json(self.folder.metrics, content)
        if self._launched is not None and (metrics_of_cluster := self._launched[2]) is not None:
            metrics_of_cluster.record(content)
        if self._trackers is not None:
            self._trackers.record(content)
        self._put()
        return content

    def _tracker_failed(self, name: str, reason: str) -> None:
        self._log.write("tracker failed", logging.WARNING, tracker=name, cause=reason)
        self.terminal.note(f"train.report_to: {name} has failed and gets nothing more of this command: {reason}")

    def _launch(self) -> tuple[Launcher, Config, Publisher | None]:
        """Return the launcher, the config with the number of workers that fit, and the publisher of metrics, if any."""
        from cluster.launch.opening import open_launcher

        with self.terminal.busy("starting workers"):
            metadata = job_metadata(self.config, self.run_id)
            launcher = self._stack.enter_context(open_launcher(self.config.cluster, metadata))
            workers = launcher.room()
        metrics = launcher.metrics(self.config)
        if metrics is not None:
            metrics.record(self.metrics())
        return launcher, self._with_workers(workers), metrics

    def _with_workers(self, workers: int) -> Config:
        if workers < self.config.cluster.workers:
            self.terminal.note(f"workers: {workers} of {self.config.cluster.workers}, because no more fit")
        return self.config.model_copy(update={"cluster": self.config.cluster.with_workers(workers)})

    def _sync(self) -> None:
        """Download files that workers without access to this folder have uploaded, and upload the new ones here."""
        if self._mirror is not None and self.claims:
            self._mirror.fetch()
            self._mirror.put()

    def _put(self) -> None:
        if self._mirror is not None and self.claims:
            self._mirror.put()

    def _look(self, event: dict[str, Any]) -> None:
        if self._mirror is not None and self.claims:
            self._mirror.look()
