"""The flow, top to bottom: config → inspect → measure and choose → train → delta."""

from __future__ import annotations

import json
import logging
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapeft.artifact import provenance, save_json
from adapeft.choose.locate import locate
from adapeft.choose.store import hash_of
from adapeft.choose.subset import Subset
from adapeft.config import Config, Trials, measurement_key
from adapeft.errors import AdapeftError
from adapeft.measure.storage import ELEMENTS, OPTIONS, TABLE, load_statistics
from adapeft.ranks import OneRank
from adapeft.ship.delta import Delta
from cluster.console import Terminal, short
from cluster.estimate import estimate_of
from cluster.events import to_all
from cluster.failure import WorkerError
from cluster.fits import check_memory
from cluster.identity import job_metadata, run_id
from cluster.inputs import count_examples
from cluster.inspect import Inspection, inspect
from cluster.json_log import EventLog
from cluster.mirror import Mirror, fetched
from cluster.place import is_url
from cluster.run_folder import RunFolder

if TYPE_CHECKING:  # with Ray, for which nobody waits who runs no stage
    from cluster.metrics import Metrics


def run(session: Session) -> dict[str, Any]:
    """Measures, chooses, trains and evaluates; takes up again whatever an earlier call of the same run has finished."""
    if not session.folder.delta.is_file():
        session.check_memory()
    return train(session, select(session))


class Session:
    """One command on one run: its folder, its inspected config, and Ray once a stage needs it.

    Args:
        config: of the run.
        terminal: where progress goes.
        claims: whether the command writes the run's artifacts, so that the folder has to be this config's.
    """

    def __init__(self, config: Config, terminal: Terminal, *, claims: bool = True) -> None:
        self.config, self.terminal, self.claims = config, terminal, claims
        self.folder = RunFolder.of(config)
        self.inspection: Inspection
        self._mirror = Mirror(config.output) if is_url(config.output) else None
        self._log = EventLog(self.folder.events, run_id(config))
        self._metrics: Metrics | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        with self.terminal.busy("checking config, data and model"):
            self.inspection = inspect(self.config)
        if self._mirror is not None:
            with self.terminal.busy("fetching what the output holds"):
                self._mirror.fetch()
        if self.claims:
            self.folder.claim(self.config)
            self._put()
            self.terminal.show_plan(self.config, self.inspection)
        else:
            self.terminal.show_inputs(self.config, self.inspection)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and self.folder.logs.is_dir():
            self._log.write("failed", logging.ERROR, cause=f"{type(error).__name__}: {error}")
        self._log.close()
        self._stack.close()
        if error is None:
            self._put()
        elif self._mirror is not None and not self._mirror.has_failed:
            with suppress(AdapeftError, WorkerError):  # the first cause is told
                self._put()

    def interrupted(self) -> None:
        """Logs that the user ends the command, which ends without leaving the session."""
        if self.folder.logs.is_dir():
            self._log.write("interrupted", logging.WARNING)

    def on_workers(self, function: Any, stage: str, **arguments: Any) -> dict[str, Any]:
        """Runs a rank function on the config's workers, with progress on the terminal."""
        # Imported here: without a stage to run, nobody waits for Ray.
        from cluster.launch import ray_session, run_on_workers
        from cluster.metrics import Metrics

        if self._metrics is None:
            with self.terminal.busy("starting Ray"):
                self._stack.enter_context(ray_session(self.config.cluster, job_metadata(self.config)))
            self._metrics = Metrics(self.config)
            self._metrics.record(self.metrics())
        self._log.write("started", stage=stage, workers=self.config.cluster.workers)
        with self.terminal.watch(stage) as watch:
            tell = to_all(watch, self._log, self._metrics, self._look)
            result = run_on_workers(function, self.config, stage, tell, **arguments)
        self._log.write("ended", stage=stage)
        self._put()
        return result

    def check_memory(self) -> None:
        """See ``cluster.fits.check_memory``."""
        with self.terminal.busy("estimating memory"):
            check_memory(estimate_of(self.config, self.inspection))

    def metrics(self) -> dict[str, Any]:
        """What ``metrics.json`` holds so far."""
        return json.loads(self.folder.metrics.read_text()) if self.folder.metrics.is_file() else {}

    def record(self, **metrics: Any) -> dict[str, Any]:
        """Adds to ``metrics.json``."""
        content = self.metrics()
        seconds = {**content.get("seconds", {}), **metrics.pop("seconds", {})}
        content = {**content, **metrics, "seconds": seconds, "provenance": provenance()}
        save_json(self.folder.metrics, content)
        if self._metrics is not None:
            self._metrics.record(content)
        self._put()
        return content

    def _put(self) -> None:
        if self._mirror is not None and self.claims:
            self._mirror.put()

    def _look(self, event: dict[str, Any]) -> None:
        if self._mirror is not None and self.claims:
            self._mirror.look()


def select(session: Session) -> Subset:
    """The run's subset: a saved one, the one chosen before, or measured and chosen now."""
    config, folder = session.config, session.folder
    if folder.subset.is_file():
        session.terminal.note(f"subset: already chosen, {short(folder.subset)}")
        return Subset.load(folder.subset)
    started = time.perf_counter()
    measured: dict[str, Any] = {}
    if config.train.subset is not None:
        # A name may come to stand for another subset: the run says which one it had.
        path = locate(config.train.subset)
        subset = Subset.load(path).described(source={"subset": config.train.subset, "sha256": hash_of(path)})
        subset.save(folder.subset)
    elif config.select.statistics is not None:
        subset = _choose_again(session, fetched(config.select.statistics, (TABLE, OPTIONS, ELEMENTS)))
    else:
        from cluster.measure import measure_and_choose

        measured = session.on_workers(measure_and_choose, "measure", limit=session.inspection.limit)
        subset = Subset.load(folder.subset)
    session.record(**_choice_of(subset), **measured, seconds={"select": time.perf_counter() - started})
    session.terminal.show_choice(subset)
    return subset


def train(session: Session, subset: Subset) -> dict[str, Any]:
    """Trains the subset and ships the delta; nothing when that was done before."""
    folder = session.folder
    metrics = session.metrics()
    if "after" in metrics and folder.delta.is_file():
        session.terminal.note(f"training: already done, {short(folder.delta)}")
    else:
        from cluster.finetune import finetune

        started = time.perf_counter()
        result = session.on_workers(finetune, "train", subset_path=str(folder.subset))
        metrics = session.record(
            **_choice_of(subset),
            **result,
            **_sizes(session.inspection, Delta.load(folder.delta), folder),
            seconds={"train": time.perf_counter() - started},
        )
    session.terminal.show_summary(session.config, metrics, folder)
    return metrics


def evaluate(session: Session, delta: Path | None) -> dict[str, float]:
    """Scores of the base model, or of base and ``delta``."""
    from cluster.evaluate import evaluate as evaluate_on_rank

    scores = session.on_workers(evaluate_on_rank, "evaluate", delta=None if delta is None else str(delta))
    session.terminal.show_scores(scores)
    return scores


def validate(session: Session, trials: Trials) -> dict[str, Any]:
    """Whether predictions hold for this model and task; writes ``validation.json``.

    Raises:
        AdapeftError: groups of several tensors, of which no random subsets are drawn.
    """
    from cluster.validate import save_validation, validate_on_rank

    if session.config.select.granularity == "role":
        raise AdapeftError(
            "select.groups = role: validate draws the groups of single tensors. Take groups: tensor, row or element."
        )
    result = session.on_workers(validate_on_rank, "validate", trials=trials)
    path = save_validation(session.folder.path, result, trials)
    session.terminal.show_validation(result)
    session.terminal.note(f"all figures: {short(path)}")
    return result


def _choose_again(session: Session, source: Path) -> Subset:
    """Chooses from another run's measurements, which must have been made under the same conditions."""
    from cluster.measure import choose_and_save

    statistics, measured = load_statistics(source)
    wanted = measurement_key(session.config)
    other = [
        f"{key}: {wanted[key]} here, {measured.get(key)} there" for key in wanted if wanted[key] != measured.get(key)
    ]
    if other:
        raise AdapeftError(
            f"select.statistics = {source} was measured otherwise:\n  " + "\n  ".join(other) + "\nMeasure anew: leave "
            "select.statistics out."
        )
    return choose_and_save(
        session.config,
        statistics,
        count_examples(session.config, session.inspection.description),
        OneRank(),
        session.inspection.limit,
    )


def _choice_of(subset: Subset) -> dict[str, Any]:
    keys = (
        *("method", "granularity", "budget", "value", "bound", "gap", "status", "reach", "num_groups", "num_chosen"),
        *("memory_per_device", "memory_bytes"),
    )
    return {"choice": {key: subset.description.get(key) for key in keys}, "trainable_parameters": subset.count}


def _sizes(inspection: Inspection, delta: Delta, folder: RunFolder) -> dict[str, Any]:
    return {
        "total_parameters": inspection.groups.num_total,
        "always_trained_parameters": inspection.num_always_trained,
        "changed_parameters": delta.count,
        "delta_bytes": folder.delta.stat().st_size,
    }
