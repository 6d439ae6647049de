"""The planned learning rates are those of transformers' schedules, and what cannot be planned is refused."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from transformers import SchedulerType, get_scheduler

from adapeft.errors import AdapeftError
from adapeft.sections.train import _UNPLANNED, Schedule, Train
from cluster.inspection.plan import plan_training

OPTIONS = {
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "inverse_sqrt": {"timescale": 7},
    "cosine_with_min_lr": {"min_lr": 2e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 11, "decay_type": "1-sqrt", "min_lr_ratio": 0.05},
}
SCHEDULES = get_args(Schedule)


def plan(name: str, options: dict | None = None, **settings):
    settings = {"warmup_ratio": 0 if name == "constant" else 0.1, "learning_rate": 0.01, "epochs": 3, **settings}
    return plan_training(Train(lr_scheduler_type=name, lr_scheduler_kwargs=options or {}, **settings), 380)


def test_every_schedule_of_transformers_is_planned_or_refused():
    assert sorted([*SCHEDULES, *_UNPLANNED]) == sorted(kind.value for kind in SchedulerType)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_are_those_of_transformers(name):
    options = OPTIONS.get(name, {})
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.01)
    schedule = get_scheduler(name, optimizer, 4, 36, options)
    expected = []
    for _ in range(36):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert plan(name, options).num_steps == 36
    assert plan(name, options).learning_rates() == expected
    if options:
        assert len(set(expected)) > 2
        without = plan(name, {"warmup_stable_decay": {"num_decay_steps": 5}}.get(name, {}))
        if name not in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):  # these need an option
            assert without.learning_rates() != expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("constant", {"num_cycles": 1}, "'num_cycles' is no option of the schedule constant, which has no options"),
        ("linear", {"num_training_steps": 5}, "'num_training_steps' is no option of the schedule linear"),
        ("cosine_with_min_lr", {"min_lr_rat": 0.1}, "'min_lr_rat' is no option .* Did you mean 'min_lr_rate'"),
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
        ("polynomial", {"lr_end": -1.0}, "the learning rate of step 6 would be -"),
        ("polynomial", {"power": "high"}, "refuses them"),
        ("cosine", {"num_cycles": "many"}, "could not convert"),
        ("inverse_sqrt", {"timescale": 0}, "division by zero"),
    ],
)
def test_options_that_the_schedule_refuses_are_named(name, options, message):
    with pytest.raises(AdapeftError, match=r"train\.lr_scheduler_kwargs = .*" + message):
        plan(name, options).learning_rates()


def test_constant_has_no_warmup_as_in_transformers():
    with pytest.raises(AdapeftError, match=r"constant: has no warmup, but train\.warmup_ratio is 0\.1\. Set .* or .*"):
        plan("constant", warmup_ratio=0.1).learning_rates()


def test_a_shortened_schedule_has_the_same_shape():
    whole = plan("warmup_stable_decay", {"num_decay_steps": 100, "min_lr_ratio": 0.1}, max_steps=400)
    short = whole.shortened(40)
    rates, few = whole.learning_rates(), short.learning_rates()
    assert len(few) == 40
    for step in range(1, 40):
        assert few[step] == pytest.approx(rates[10 * step], rel=0.15), step
    assert short.train.lr_scheduler_kwargs == {"num_decay_steps": 10, "min_lr_ratio": 0.1}
