"""The Trainer with DeepSpeed: delta, checkpoints and resumed runs equal those of one process without it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from adapeft import Delta, delta
from tests.on_ranks.trainer import RUNS, attached, trainer_of
from tests.oracles.leaves import logits
from tests.support.ranks import run_on_ranks
from tests.support.tiny import make_bert

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    run_on_ranks(2, "tests.on_ranks.trainer", folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    model = attached()
    trainer_of(model, tmp_path_factory.mktemp("plain"), 1, save_strategy="no").train()
    return delta(model)


def values(found: Delta) -> dict[str, torch.Tensor]:
    return {**{name: change.values for name, change in found.changes.items()}, **found.new}


@pytest.mark.parametrize("run", RUNS)
def test_the_delta_is_that_of_one_process_on_every_rank(run, out, plain):
    first = values(Delta.load(out / run / "delta-0.safetensors"))
    for file in ("delta-1", "wrapped-0", "wrapped-1"):
        other = values(Delta.load(out / run / f"{file}.safetensors"))
        assert all(torch.equal(other[name], value) for name, value in first.items())
    assert first.keys() == values(plain).keys()
    for name, expected in values(plain).items():
        assert first[name].any()
        if "bf16" not in run:
            torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_the_saved_model_is_the_trained_model(run, out):
    base = make_bert()
    Delta.load(out / run / "delta-0.safetensors").apply(base)
    expected = logits(base)
    assert not torch.allclose(expected, logits(make_bert()), atol=0.1)
    close = {"rtol": 5e-2, "atol": 5e-2} if "bf16" in run else {"rtol": 1e-4, "atol": 1e-5}
    loaded, info = BertForSequenceClassification.from_pretrained(out / run / "final", output_loading_info=True)
    torch.testing.assert_close(logits(loaded.float()), expected, **close)
    assert not any(info.values())


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_holds_what_is_trained(run, out):
    model = attached()
    state = load_file(out / run / "checkpoint-4" / "model.safetensors")
    assert model.load_state_dict(state) == ([], [])
    expected = values(Delta.load(out / run / "delta-0.safetensors"))
    close = {"rtol": 1e-2, "atol": 1e-2} if "bf16" in run else {"rtol": 1e-5, "atol": 1e-6}
    for name, value in values(delta(model)).items():
        torch.testing.assert_close(value, expected[name], **close)


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_training_equals_an_uninterrupted_one(run, out):
    resumed, through = (Delta.load(out / run / f"{file}-0.safetensors") for file in ("resumed", "delta"))
    for name, value in values(through).items():
        torch.testing.assert_close(values(resumed)[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("run", RUNS)
def test_models_held_by_an_engine_are_refused_by_name(run, out):
    for rank in range(2):
        attaching, detaching, saving = torch.load(out / run / f"refused-{rank}.pt")
        assert "wrapped in DeepSpeedEngine" in attaching
        if run != "zero2":
            assert "(ZeRO-3)" in detaching
            assert "state_dict=accelerator.get_state_dict(engine)" in saving
