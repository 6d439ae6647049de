"""``adapeft validate``: the rank function and its figures on whether the influence predicts the gain of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from adapeft.config.config import Config
from adapeft.config.experiments import Trials
from adapeft.data.batches import draw_calibration, evaluation_batches
from adapeft.measure.groups import groups_of
from adapeft.measure.influence import planned_reach
from adapeft.measure.measure import ready
from adapeft.measure.mode import measuring_mode
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.registry import get_method
from adapeft.validate.correlation import correlate, fit_constant
from adapeft.validate.draw import Draw, draw_subsets, subset_of_draw
from adapeft.validate.estimators import Measured, measure_estimators
from adapeft.validate.outcome import Trial
from cluster.events import Report
from cluster.ranks.inputs import check_loss, load_inputs
from cluster.zero.engine import join

_NUM_FISHER_EXAMPLES = 128
_PREDICTED = ("influence (adam)", "joint influence (adam)", "least joint influence (adam)")
"""Estimators whose predictions, which are loss decreases, are kept."""


def validate_on_rank(config: Config, report: Report, trials: Trials) -> dict[str, Any]:
    """Measure the whole model on every rank, and train this rank's share of the random subsets.

    Returns:
        Content of ``validation.json``; rank 0's is used.
    """
    ranks = join()
    report({"step": "loading model and data"})
    inputs = load_inputs(config, report=report)
    contents = inputs.claimed_contents()
    model: nn.Module = inputs.model()
    model.to(ranks.device)
    groups = groups_of(model, config.select)
    draws = draw_subsets(groups, trials.sizes, trials.subsets, trials.singles, config.seed)
    calibration = draw_calibration(
        len(inputs.train), config.select.calibration, config.select.batch_size, 1, config.seed
    )
    with measuring_mode(model, restore=()):
        check_loss(model, inputs, ranks.world_size, report)
        shards = WholeModel(model, [info.name for info in groups.parameters], groups.always_train)
        plain = Passes(
            shards,
            inputs.objective,
            calibration,
            inputs.train.collate,
            config.seed,
            lambda step, done, total: report({"step": step, "done": done, "total": total}),
        )
        passes = ready(get_method(config.select.method), plain, groups, config.select)
        singles = tuple(np.concatenate(calibration.batches)[:_NUM_FISHER_EXAMPLES, None])
        examples = replace(passes, calibration=replace(calibration, half_a=singles, half_b=()))
        measured = measure_estimators(model, passes, groups, draws, examples)
        batches = inputs.training_batches(epoch=0)
        passes.warm_up(batches)
        trial = Trial(
            model,
            inputs.objective,
            inputs.train.collate,
            batches,
            (inputs.evaluation.collate, evaluation_batches(min(trials.held_out, len(inputs.evaluation)), 64)),
        )
        mine = range(ranks.rank, len(draws), ranks.world_size)
        found: dict[int, list[list[float]]] = {}
        for done, index in enumerate(mine):
            subset = subset_of_draw(groups, draws[index])
            found[index] = [trial.decreases(subset, rate, trials.steps) for rate in trials.learning_rates]
            report({"step": "training random subsets", "done": done + 1, "total": len(mine)})
    everyone = {index: value for part in ranks.all_gather_object(found) for index, value in part.items()}
    # [draws, learning rates, horizons]
    outcomes = np.array([everyone[index] for index in range(len(draws))])
    conditions = {"granularity": groups.granularity, "base": trial.base_loss, "contents": contents}
    return summarize(trials, draws, measured, outcomes) | conditions


def summarize(trials: Trials, draws: Sequence[Draw], measured: Measured, outcomes: np.ndarray) -> dict[str, Any]:
    """Correlate estimators and ``outcomes`` [draws, rates, horizons] for each learning rate and horizon."""
    settings = []
    for i, rate in enumerate(trials.learning_rates):
        for j, steps in enumerate(trials.steps):
            decreases = outcomes[:, i, j]
            constant = fit_constant(_additive(measured, draws), decreases, rate * steps)
            reach = planned_reach(rate * steps, steps)
            predictions = measured.predictions(draws, reach)
            found = correlate(predictions, decreases, draws)
            fitted = correlate(measured.predictions(draws, constant * rate * steps), decreases, draws)
            settings.append(
                {
                    "learning_rate": rate,
                    "steps": steps,
                    "reach": reach,
                    "fitted_constant": constant,
                    "planned_constant": reach / (rate * steps),
                    "overshooting": float((decreases < 0).mean()),
                    "diverged": float(np.isneginf(decreases).mean()),
                    "correlations": {
                        name: {"all": value.all, **{_size(size): rho for size, rho in value.by_size.items()}}
                        for name, value in found.items()
                    },
                    "at_fitted_reach": {name: value.all for name, value in fitted.items() if "influence (" in name},
                    "decreases": decreases.tolist(),
                    "predictions": {name: predictions[name].tolist() for name in _PREDICTED},
                }
            )
    return {
        "settings": settings,
        "draws": [{"size": draw.size, "count": draw.count, "tensors": len(draw.units)} for draw in draws],
    }


def _additive(measured: Measured, draws: Sequence[Draw]) -> Callable[[float], np.ndarray]:
    return lambda reach: measured.predictions(draws, reach)["influence (adam)"]


def _size(size: float) -> str:
    return f"{size:.4g}" if size else "single tensors"
