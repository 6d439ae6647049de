"""The stages of a run, in order: config → inspect → measure and choose → train → delta."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from adapeft.config.experiments import Trials
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.methods.registry import get_method
from adapeft.subset.empty import check_not_empty
from adapeft.subset.locate import locate
from adapeft.subset.store import hash_of
from adapeft.subset.subset import Subset
from adapeft.subset.verdict import verdict_of
from cluster.inspection.inspection import Inspection
from cluster.output.folder import RunFolder
from cluster.output.generations import load_generations
from cluster.run.session import Session
from cluster.terminal.console import short
from cluster.terminal.generations import show_generations


def run(session: Session) -> dict[str, Any]:
    """Measure, choose, train and evaluate; what an earlier command of the same run finished is not repeated."""
    if not session.folder.delta.is_file():
        session.check_memory()
        session.track()
    return train(session, select(session))


def select(session: Session) -> Subset:
    """Return the run's subset: a saved one, one chosen by an earlier call, or one chosen now.

    With ``train.learning_rate: auto``, also find the learning rate, on which the choice may depend.

    Raises:
        AdapeftError: the subset is empty.
    """
    found = session.metrics().get("learning_rate")
    if session.config.train.learning_rate == "auto" and found is not None:
        session.settle(found)
    subset = _chosen(session)
    if session.config.train.learning_rate == "auto":
        from cluster.run.search import search_learning_rate

        started = time.perf_counter()
        subset = search_learning_rate(session, subset)
        rate, seconds = session.config.train.learning_rate, time.perf_counter() - started
        session.record(**_choice_of(subset), learning_rate=rate, seconds={"search": seconds})
        session.terminal.show_choice(subset)
    return subset


def _chosen(session: Session) -> Subset:
    config, folder = session.config, session.folder
    if folder.subset.is_file():
        session.terminal.note(f"subset: already chosen, {short(folder.subset)}")
        subset = Subset.load(folder.subset)
        check_not_empty(subset)
        session.terminal.show_empty(subset)
        return subset
    started = time.perf_counter()
    measured: dict[str, Any] = {}
    if config.train.subset is not None:
        # A name may later refer to another subset, so the run records the hash of the one it trained.
        path = locate(config.train.subset)
        subset = Subset.load(path).described(source={"subset": config.train.subset, "sha256": hash_of(path)})
        subset.save(folder.subset)
    elif config.select.statistics is not None:
        from cluster.run.again import choose_again

        subset = choose_again(session)
    else:
        subset, measured = _choose(session)
    session.record(**_choice_of(subset), **measured, seconds={"select": time.perf_counter() - started})
    # An empty choice stays in the folder, so that the same command reports it again without measuring.
    check_not_empty(subset)
    session.terminal.show_choice(subset)
    return subset


def train(session: Session, subset: Subset) -> dict[str, Any]:
    """Train the subset, write the delta and return the metrics; skips the training if it is already done."""
    folder = session.folder
    metrics = session.metrics()
    if "after" in metrics and folder.delta.is_file():
        session.terminal.note(f"training: already done, {short(folder.delta)}")
    else:
        from cluster.ranks.finetune import finetune

        session.track()
        started = time.perf_counter()
        result = session.on_workers(finetune, "train")
        metrics = session.record(
            **_choice_of(subset),
            **result,
            learning_rate=session.config.train.learning_rate,
            **_sizes(session.inspection, Delta.load(folder.delta), folder),
            seconds={"train": time.perf_counter() - started},
        )
        folder.report.unlink(missing_ok=True)
    if not folder.report.is_file():
        from cluster.output.report import write_report

        write_report(folder, session.config)
    show_generations(
        session.terminal, load_generations(folder.generations), load_generations(folder.generations_before)
    )
    session.terminal.show_summary(session.config, metrics, folder)
    return metrics


def evaluate(session: Session, delta: Path | None, *, base: bool) -> dict[str, float]:
    """Return the scores of the ``base`` model alone, or with ``delta`` applied (None: the run's own delta)."""
    from cluster.ranks.evaluate import evaluate as evaluate_on_rank

    found = session.on_workers(evaluate_on_rank, "evaluate", delta=delta and str(delta), base=base)
    session.terminal.show_scores(found["scores"])
    show_generations(session.terminal, found["generations"])
    return found["scores"]


def validate(session: Session, trials: Trials) -> dict[str, Any]:
    """Test the predictions for this model and task: writes ``validation.json``, or shows it if it exists.

    Raises:
        AdapeftError: validate has nothing to predict for the method, or cannot try its subsets on the model.
    """
    from cluster.output.validation import load_validation, save_validation
    from cluster.terminal.validation import show_validation

    method = session.config.select.method
    if not get_method(method).measures_loss:
        raise AdapeftError(
            f"select.method = {method}: it does not measure the loss, which validate predicts. Set select.method: "
            "adapeft, and on a language model select.groups: element."
        )
    if session.inspection.groups.is_quantized:
        raise AdapeftError(
            f"model.name = {session.config.model.name!r} is quantized: validate compares estimators that need the "
            "gradients of single elements, which quantized matrices do not have. Give the base without quantization."
        )
    trials.check(session.config, session.inspection.groups.num_total)
    path = session.folder.validation
    if path.is_file():
        session.terminal.note(f"validation: already done, {short(path)}")
    else:
        from cluster.ranks.validate import validate_on_rank

        save_validation(path, session.on_workers(validate_on_rank, "validate", trials=trials), trials)
    result = load_validation(path, trials)
    if not session.folder.validation_report.is_file():
        from cluster.output.report import write_validation_report

        write_validation_report(session.folder, session.config, result)
    show_validation(result, session.terminal)
    session.terminal.note(f"all figures: {short(path)}, pictures: {short(session.folder.validation_report)}")
    return result


def _choose(session: Session) -> tuple[Subset, dict[str, Any]]:
    """Return the subset of the run's method and the entries of ``metrics.json`` about its measurement, if any."""
    if not get_method(session.config.select.method).measures_loss:
        from cluster.run.unloaded import choose_unloaded

        chosen = choose_unloaded(session)
        if chosen is not None:
            return chosen, {}
    from cluster.ranks.measure import measure_and_choose

    measured = session.on_workers(measure_and_choose, "measure", limit=session.inspection.limit)
    return Subset.load(session.folder.subset), measured


def _choice_of(subset: Subset) -> dict[str, Any]:
    keys = (
        *("method", "granularity", "budget", "value", "joint_value", "bound", "gap", "status", "reach"),
        *("num_groups", "num_chosen", "memory_per_device", "memory_bytes", "unspent", "num_drawn", "share"),
        *("reliability", "directions", "candidate_directions"),
    )
    choice = {key: getattr(subset.choice, key) for key in keys}
    verdict = verdict_of(subset.choice)
    judged = {} if verdict is None else {"verdict": verdict._asdict()}
    return {"choice": choice, **judged, "trainable_parameters": subset.count}


def _sizes(inspection: Inspection, delta: Delta, folder: RunFolder) -> dict[str, Any]:
    return {
        "total_parameters": inspection.groups.num_total,
        "always_trained_parameters": inspection.num_always_trained,
        "changed_parameters": delta.count,
        "delta_bytes": folder.delta.stat().st_size,
    }
