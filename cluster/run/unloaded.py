"""Choosing without workers, for methods that do not measure the loss: from the base's structure and checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from adapeft.config.config import Config
from adapeft.data.batches import draw_calibration
from adapeft.data.description import Batch
from adapeft.measure.groups import groups_of
from adapeft.measure.mode import set_measuring_mode
from adapeft.measure.statistics import Statistics
from adapeft.measure.unreached import check_reached, unreached_without_weights
from adapeft.measure.weights import measure_weights
from adapeft.methods.registry import get_method
from adapeft.model.unloaded.unloaded import NeedsLoadingError, open_unloaded
from adapeft.ranks import OneRank
from adapeft.subset.subset import Subset
from cluster.ranks.choose import choose_and_save
from cluster.ranks.inputs import Inputs, load_inputs
from cluster.run.session import Session


def choose_unloaded(session: Session) -> Subset | None:
    """Choose in this process, which reads weights only if the method scores them; None if that needs a loaded model."""
    try:
        with session.terminal.busy("choosing without loading the model"):
            inputs = load_inputs(session.config)
            statistics = _statistics(session, inputs)
            return choose_and_save(
                session.config,
                session.contents,
                statistics,
                inputs.num_examples,
                OneRank(),
                session.inspection.limit,
            )
    except NeedsLoadingError as error:
        session.terminal.note(f"{session.config.select.method} chooses with the model loaded in every worker: {error}")
        return None


def _statistics(session: Session, inputs: Inputs) -> Statistics:
    """Return what a measurement on workers would: groups with a fingerprint and without what no gradient reaches."""
    config, method = session.config, get_method(session.config.select.method)
    model, settings = config.model, config.select
    base = open_unloaded(model, session.inspection.model_config, settings.always_train)
    groups = groups_of(base.structure, settings)
    groups = replace(groups, fingerprint=base.checkpoint.fingerprint(groups.new))
    set_measuring_mode(base.structure)
    unreached = unreached_without_weights(
        base.structure, base.weightless, groups, _calibration(config, inputs), inputs.objective
    )
    check_reached(groups, unreached)
    groups = groups.without(unreached)
    if method.scored is None:
        return Statistics(groups, {})
    dtype = getattr(torch, model.dtype)
    return measure_weights(base.checkpoint, groups, settings, method.scored, method.score, dtype, session.folder.path)


def _calibration(config: Config, inputs: Inputs) -> Iterator[Batch]:
    settings = config.select
    drawn = draw_calibration(
        len(inputs.train), settings.calibration, settings.batch_size, config.cluster.workers, config.seed
    )
    return map(inputs.train.collate, drawn.batches)
