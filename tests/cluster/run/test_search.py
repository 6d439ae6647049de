"""``train.learning_rate: auto``, through the command and DeepSpeed."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from adapeft.parts.elements import Elements
from adapeft.subset.subset import Subset
from cluster.run.rates import RATES, doubt, refined, usual_rate
from cluster.run.search import _steps_of_trial, _try
from tests.support.checkpoints import adapeft, write_bert, write_colours, write_config

AUTO = (
    "learning_rate=auto",
    "cluster.launcher=local",
    "cluster.workers=1",
    "zero_stage=2",
    "calibration=32",
    "select.batch_size=4",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Arguments and folder of a run that has found its learning rate and not yet trained, and what it printed."""
    folder = tmp_path_factory.mktemp("search")
    config = write_config(folder / "run.yaml", write_bert(folder / "base"), *write_colours(folder))
    arguments = (config, *AUTO, "max_steps=16", f"output={folder / 'run'}")
    done = adapeft("select", *arguments)
    assert done.returncode == 0, done.stderr
    return arguments, folder / "run", done.stdout


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.ranks
def test_the_rate_that_the_held_out_losses_leave_least_in_doubt_is_found(found):
    _, folder, output = found
    metrics = metrics_of(folder)
    usual = metrics["usual_rate"]
    assert usual == usual_rate(Subset.load(folder / "subset.safetensors"))
    losses = {float(rate): trial["scores"]["loss"] for rate, trial in metrics["trials"].items() if trial["scores"]}
    doubts = {RATES.index(rate): doubt(loss, rate, usual) for rate, loss in losses.items()}
    best = min(doubts, key=doubts.__getitem__)
    assert metrics["learning_rate"] == refined(best, doubts, 4 / 16)
    assert {best - 1, best, best + 1} <= doubts.keys(), "its neighbours are worse"
    assert f"learning rate {metrics['learning_rate']:g}, from the best of {len(metrics['trials'])} trials" in output
    assert len(set(losses.values())) == len(losses), "each trial trains at its own rate"


@pytest.mark.slow
@pytest.mark.ranks
def test_the_choice_is_that_of_the_rate(found, tmp_path):
    arguments, folder, _ = found
    rate = metrics_of(folder)["learning_rate"]
    own = Subset.load(folder / "subset.safetensors")
    fixed = (f"learning_rate={rate}", f"select.statistics={folder}", f"output={tmp_path / 'fixed'}")
    done = adapeft("select", *arguments, *fixed)
    assert done.returncode == 0, done.stderr
    other = Subset.load(tmp_path / "fixed" / "subset.safetensors")
    assert own.choice.reach == other.choice.reach
    assert own.choice.directions is not None, "those of the first choice, as no later one has passes"
    assert own.choice.directions == other.choice.directions
    assert own.choice.num_drawn == other.choice.num_drawn
    assert own.parts.keys() == other.parts.keys()
    for name, part in own.parts.items():
        size = math.prod(part.shape)
        assert torch.equal(part.mask(0, size), other.parts[name].mask(0, size))


@pytest.mark.slow
@pytest.mark.ranks
def test_the_training_goes_on_at_that_rate_without_another_search(found):
    arguments, folder, _ = found
    before = metrics_of(folder)
    done = adapeft("run", *arguments)
    assert done.returncode == 0, done.stderr
    assert "search:" not in done.stdout
    metrics = metrics_of(folder)
    assert (metrics["learning_rate"], metrics["trials"]) == (before["learning_rate"], before["trials"])
    assert metrics["num_steps"] == 16
    said = f"{metrics['learning_rate']:g}, found by {len(metrics['trials'])} trials"
    assert said in (folder / "report.html").read_text()
    events = [json.loads(line) for line in (folder / "logs" / "events.jsonl").read_text().splitlines()]
    rates = [event["lr"] for event in events if "lr" in event]
    assert rates, "the schedule is logged"
    assert max(rates) <= metrics["learning_rate"] * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.ranks
def test_an_interrupted_search_repeats_only_trials_of_another_length(found, tmp_path):
    arguments, folder, _ = found
    left = tmp_path / "run"
    shutil.copytree(folder, left)
    (left / "config.yaml").write_text((folder / "config.yaml").read_text().replace(str(folder), str(left)))
    metrics = metrics_of(folder)
    rate, *others = metrics["trials"]
    shorter = {rate: {"steps": 3, "scores": {"loss": 0.001}, "problem": None}}
    rest = {key: value for key, value in metrics.items() if key != "learning_rate"}
    (left / "metrics.json").write_text(json.dumps(rest | {"trials": metrics["trials"] | shorter}))
    done = adapeft("select", *arguments, f"output={left}")
    assert done.returncode == 0, done.stderr
    again = metrics_of(left)
    assert again["learning_rate"] == metrics["learning_rate"]
    assert again["trials"][rate]["scores"]["loss"] == pytest.approx(metrics["trials"][rate]["scores"]["loss"])
    assert all(again["trials"][other] == metrics["trials"][other] for other in others)
    assert done.stdout.count("search: starting workers") == 1


@pytest.mark.parametrize(("parts", "ran"), [({}, False), ({"w": Elements((4,), torch.tensor([1]))}, True)])
def test_a_rate_at_which_nothing_is_chosen_is_a_trial_without_a_score(parts, ran):
    called = []
    session = SimpleNamespace(
        on_workers=lambda *args, **kwargs: called.append(kwargs) or {"scores": {"loss": 1.0}, "problem": None},
    )
    found = _try(session, Subset(parts), 8)
    assert called == ([{"num_steps": 8}] if ran else [])
    assert (found["scores"] is None) == ("nothing to train" in str(found["problem"])) == (not ran)


@pytest.mark.parametrize(("whole", "steps"), [(2, 2), (16, 4), (40, 4), (60, 6), (132, 13), (536, 53)])
def test_a_trial_is_a_tenth_of_a_training(whole, steps):
    assert _steps_of_trial(whole) == steps
    if whole >= 40:
        assert 5 * steps <= whole / 2, "five trials take half of a training at most"
