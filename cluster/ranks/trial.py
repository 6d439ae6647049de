"""The rank function of a trial: a short training that shows how well a learning rate trains the run's subset."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from adapeft.config.config import Config
from adapeft.errors import AdapeftError
from adapeft.finite import DIVERGED
from cluster.events import Report
from cluster.inspection.plan import plan_training
from cluster.ranks.evaluate import score
from cluster.ranks.finetune import attached
from cluster.ranks.head_rate import find_head_rate
from cluster.ranks.inputs import Inputs, load_inputs
from cluster.ranks.steps import TrainingSteps
from cluster.zero.engine import join, release

_FEWEST_HELD_OUT = 32
_MOST_HELD_OUT = 256


def try_learning_rate(config: Config, report: Report, num_steps: int) -> dict[str, Any]:
    """Train the run's subset for a few steps, with the schedule of a whole training, and score held-out examples.

    Nothing is written: neither a checkpoint nor a delta.

    Args:
        config: config of the run, with the learning rate to try.
        report: callback for progress events.
        num_steps: number of optimizer steps.

    Returns:
        ``scores`` on the held-out part of the training data, or None and ``problem`` if the training diverged.
    """
    ranks = join()
    report({"step": "loading model and data"})
    inputs = _held_out(load_inputs(config, report=report), num_steps * config.train.batch_size)
    plan = plan_training(config.train, len(inputs.train)).shortened(num_steps)
    model, engine = attached(inputs, plan, ranks)
    find_head_rate(engine, inputs, ranks)
    steps = TrainingSteps(inputs, plan, engine, model, ranks)
    engine.train()
    found: dict[str, Any] = {"scores": None, "problem": None}
    for number, batch in enumerate(islice(inputs.steps(0, report), num_steps)):
        taken = steps.take(batch, number)
        if not taken.is_taken:
            found["problem"] = f"{DIVERGED} at step {number + 1}: {taken.problem}"
            break
        report({"step": "trying", "done": number + 1, "total": num_steps, "loss": taken.loss})
    else:
        with steps.follower.as_shipped():
            try:
                found["scores"] = score(engine, inputs, ranks, report, DIVERGED).scores
            except AdapeftError as error:  # the same on every rank
                found["problem"] = str(error)
    release(engine)
    return found


def _held_out(inputs: Inputs, num_trained: int) -> Inputs:
    """Return inputs that evaluate on a random part of the training data, and train on the rest.

    The part is a tenth at most, and as many examples as the trial trains on, from 32 to 256: trials are compared on
    the same examples, and on 256 those of 64 (SmolLM2 on nl2bash) took longer to evaluate than to train.
    """
    train = inputs.train
    order = np.random.default_rng([inputs.config.seed, 6]).permutation(len(train))
    size = max(1, min(len(train) // 10, _MOST_HELD_OUT, max(_FEWEST_HELD_OUT, num_trained)))
    return replace(inputs, train=train.select(order[size:]), evaluation=train.select(order[:size]), prompts=None)
