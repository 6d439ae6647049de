"""The trackers of one run, opened in the launching process: workers need neither their packages nor their tokens."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from adapeft.config.config import Config
from adapeft.config.keys import comparable
from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_json
from adapeft.files.damage import Header, Line, load_json, reading
from adapeft.sections.paths import without_secrets
from cluster.output.folder import RunFolder
from cluster.tracking.mlflow import MLflow
from cluster.tracking.tensorboard import TensorBoard
from cluster.tracking.tracker import TrackedRun, Tracker
from cluster.tracking.wandb import Wandb

TRACKERS: Mapping[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}
"""Name in ``train.report_to``, which is also that of the package → tracker."""

_EXTRAS = {"tensorboard": "cluster"}
_REMEDY = "Remove it to start new runs in the trackers."
_INTERRUPT_SECONDS = 5.0

Failed = Callable[[str, str], None]
"""Callback for the name of a tracker that has failed, and the reason."""


class _Entry(Header):
    id: Line
    failed: str | None = None


_RECORD = TypeAdapter(dict[str, _Entry])


class Trackers:
    """Sends the figures of a run to its trackers, each in a thread of its own: a slow server must not delay a step.

    A tracker that fails is reported to ``failed`` and in ``tracking.json``, and gets nothing more from this command.

    Args:
        config: config of the run.
        run_id: its identity.
        folder: folder of the run, which holds the ids of the runs in the trackers.
        failed: callback for failures.

    Raises:
        AdapeftError: a package is missing, or a tracker does not start.
    """

    def __init__(self, config: Config, run_id: str, folder: RunFolder, failed: Failed) -> None:
        names = tuple(dict.fromkeys(config.train.report_to))
        _check_installed(names)
        self._path, self._failed = folder.tracking, failed
        self._record = _load(self._path)
        self._senders: dict[str, _Sender] = {}
        self._has_choice, self._is_searched = False, config.train.learning_rate == "auto"
        values = {
            key: without_secrets(value) if isinstance(value, str) else value
            for key, value in comparable(config).items()
        }
        for name in names:
            known = self._record[name].id if name in self._record else None
            try:
                sender = _Sender(TRACKERS[name]())
                self._record[name] = _Entry(id=sender.start(TrackedRun(run_id, values, folder.logs, known)))
            except Exception as error:
                self.close(failed=True)
                run = "" if known is None else f" with the run {known!r} that {self._path} names"
                raise AdapeftError(
                    f"train.report_to: {name} does not start{run}: {_reason(error)}. Correct its settings or leave it "
                    "out."
                ) from error
            self._senders[name] = sender
        if names:
            self._save()

    def __call__(self, event: dict[str, Any]) -> None:
        """Record the losses, learning rates and scores of an event of rank 0."""
        if event["step"] == "training":
            self._log("train", {"loss": event["loss"], "learning_rate": event["lr"]}, event["done"])
        elif event["step"] == "evaluated":
            self._log("evaluation", event, event["at"])
        else:
            self._collect()

    def record(self, content: dict[str, Any]) -> None:
        """Record the choice in the content of ``metrics.json``, and the result once there is one."""
        # With a searched learning rate the choice may be another one before the rate is found.
        is_final = "learning_rate" in content or not self._is_searched
        if "choice" in content and is_final and not self._has_choice:
            self._has_choice = True
            choice = content["choice"]
            names = {"influence": "value", "joint_influence": "joint_value"}
            names |= {name: name for name in ("bound", "gap", "budget", "reach")}
            values = {name: choice.get(key) for name, key in names.items()}
            more = {name: content.get(name) for name in ("trainable_parameters", "learning_rate")}
            self._log("choice", {**values, **more}, 0)
        if "after" in content:
            sizes = {name: content.get(name) for name in ("delta_bytes", "peak_memory_bytes")}
            self._log("result", {**content["after"], **sizes}, content["best_step"])

    def close(self, *, failed: bool, interrupted: bool = False) -> None:
        """End the runs in the trackers once everything is sent; after an interrupt, wait only for a few seconds."""
        for sender in self._senders.values():
            sender.send(lambda tracker: tracker.finish(failed=failed))
        wait(
            [future for sender in self._senders.values() for future in sender.pending],
            timeout=_INTERRUPT_SECONDS if interrupted else None,
        )
        self._collect()
        for sender in self._senders.values():
            sender.stop()
        self._senders = {}

    def _log(self, group: str, values: Mapping[str, Any], step: int) -> None:
        numbers = {
            f"{group}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and name != "at" and math.isfinite(value)
        }
        for sender in self._senders.values():
            sender.send(lambda tracker: tracker.log(numbers, step))
        self._collect()

    def _collect(self) -> None:
        """Report the trackers that have failed since the last call, and send them nothing more."""
        for name, sender in list(self._senders.items()):
            error = sender.error()
            if error is not None:
                del self._senders[name]
                sender.stop()
                self._record[name] = _Entry(id=self._record[name].id, failed=_reason(error))
                self._save()
                self._failed(name, _reason(error))

    def _save(self) -> None:
        save_json(self._path, _RECORD.dump_python(self._record, exclude_none=True))


class _Sender:
    """Calls a tracker in its own thread, in order."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._has_failed = False
        self.pending: deque[Future[Any]] = deque()

    def start(self, run: TrackedRun) -> str:
        """Start the tracker, and raise what it raises."""
        try:
            return self._thread.submit(self._tracker.start, run).result()
        except BaseException:
            self.stop()
            raise

    def send(self, call: Callable[[Tracker], None]) -> None:
        self.pending.append(self._thread.submit(self._call, call))

    def _call(self, call: Callable[[Tracker], None]) -> None:
        if self._has_failed:
            return
        try:
            call(self._tracker)
        except Exception:
            self._has_failed = True
            with suppress(Exception):  # the first error is the one to report
                self._tracker.finish(failed=True)
            raise

    def error(self) -> BaseException | None:
        """Return the error of the first call that has failed, if any has."""
        while self.pending and self.pending[0].done():
            error = self.pending.popleft().exception()
            if error is not None:
                return error
        return None

    def stop(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _check_installed(names: tuple[str, ...]) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        extra = _EXTRAS.get(missing[0], "tracking")
        raise AdapeftError(
            f"train.report_to = [{', '.join(names)}]: {missing[0]} is not installed. Run `pip install "
            f"'adapeft[{extra}]'`, or leave it out."
        )


def _load(path: Path) -> dict[str, _Entry]:
    if not path.is_file():
        return {}
    content = load_json(path, "a record of tracked runs", _REMEDY)
    with reading(f"{path}: damaged", _REMEDY):
        return _RECORD.validate_python(content)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(". ")
