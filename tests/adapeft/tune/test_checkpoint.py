"""Tests of the Trainer's checkpoints of an attached model: small, resumed from exactly, refused if they do not fit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, ResNetConfig, ResNetForImageClassification

import adapeft
from adapeft import AdapeftError
from adapeft.parts.elements import Elements
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import make_subset, train
from tests.oracles.parts import MODELS, mixed_subset
from tests.support.tiny import make_bert
from tests.support.trainers import saving_trainer

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def subset_of(model: nn.Module, kind: str) -> Subset:
    return mixed_subset(model, adapters=kind == "adapter") if kind in ("lora", "adapter") else make_subset(model, kind)


def attached(name: str, kind: str) -> nn.Module:
    model = MODELS[name]()
    return adapeft.attach(model, subset_of(model, kind))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in attachment_of(model).trained.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items()), "bit for bit"


def saved(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Save a checkpoint as the Trainer does, and return what it loads."""
    model.save_pretrained(folder / "checkpoint-1", is_main_process=True, state_dict=None)
    return load_file(folder / "checkpoint-1" / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "mixed"),
        ("gpt2", "lora"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("bert", "adapter"), ("gpt2", "row"), ("gpt2", "tensor"))
        ),
    ],
)
def test_a_checkpoint_holds_what_is_trained_and_resumes_exactly(name, kind, tmp_path):
    through = attached(name, kind)
    saving_trainer(through, tmp_path, 4).train()
    folder = tmp_path / "checkpoint-2"
    num_trained = sum(parameter.numel() for parameter in through.parameters() if parameter.requires_grad)
    held = load_file(folder / "model.safetensors")
    assert sum(value.numel() for value in held.values() if value.is_floating_point()) == num_trained
    resumed = adapeft.attach(MODELS[name](), Subset.load(folder / "subset.safetensors"))
    saving_trainer(resumed, tmp_path, 4).train(resume_from_checkpoint=str(folder))
    assert_equal(values(resumed), values(through))


def test_the_best_model_is_loaded_at_the_end(tmp_path, caplog):
    model, best = attached("gpt2", "mixed"), attached("gpt2", "mixed")
    best_is_first = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = saving_trainer(model, tmp_path, 6, eval_strategy="steps", eval_steps=2, **best_is_first)
    trainer.train()
    assert trainer.state.best_global_step == 2
    state = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert best.load_state_dict(state, strict=True) == ([], [])
    assert_equal(values(model), values(best))
    assert "missing keys" not in caplog.text


def test_buffers_are_those_of_the_checkpoint(tmp_path):
    def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    model = ResNetForImageClassification(config)
    adapeft.attach(model, Subset({"classifier.1.bias": Whole((2,))}))
    before, state = statistics(model), saved(model, tmp_path)
    model.train()(torch.randn(4, 3, 16, 16))
    assert any(not torch.equal(value, before[name]) for name, value in statistics(model).items())
    model.load_state_dict(state, strict=False)
    assert_equal(statistics(model), before)


def test_nothing_takes_a_checkpoint_for_a_model(tmp_path):
    """Otherwise a random model would be built, or a Trainer would train on from the base, with only a warning."""
    model = attached("bert", "row")
    state = saved(model, tmp_path)
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModel.from_pretrained(folder)
    for options in ({}, {"config": model.config}):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            type(make_bert()).from_pretrained(folder, **options)
    with pytest.raises(RuntimeError, match="size mismatch for bert"):
        make_bert().load_state_dict(state, strict=False)


def test_a_copy_takes_a_checkpoint_too(tmp_path):
    model = attached("bert", "mixed")
    train(model)
    copied, state = copy.deepcopy(model), saved(model, tmp_path)
    train(copied)
    copied.load_state_dict(state)
    assert_equal(values(copied), values(model))


def test_what_does_not_fit_is_refused(tmp_path):
    shape = tuple(make_bert().get_parameter(QUERY).shape)
    subset = Subset({QUERY: Elements(shape, torch.tensor([1, 5]))})
    model = adapeft.attach(make_bert(), subset)
    state = saved(model, tmp_path)
    for other in ({QUERY: Elements(shape, torch.tensor([1, 6]))}, {QUERY: Rows(shape, torch.tensor([1]))}):
        with pytest.raises(AdapeftError, match=r"another subset .*Subset\.load\('checkpoint-…/subset\.safetensors'\)"):
            adapeft.attach(make_bert(), Subset(other)).load_state_dict(state, strict=False)
    with pytest.raises(AdapeftError, match=f"One of them trains '{QUERY}_leaf', the other does not"):
        model.load_state_dict({name: value for name, value in state.items() if "leaf" not in name}, strict=False)
    base = make_bert()
    with torch.no_grad():
        base.get_parameter(QUERY).mul_(1.1)
    with pytest.raises(AdapeftError, match="was trained on a base model with fingerprint"):
        adapeft.attach(base, subset).load_state_dict(state, strict=False)
    with adapeft.base(model), pytest.raises(AdapeftError, match="load_state_dict: the delta is switched off"):
        model.load_state_dict(state, strict=False)


def test_the_trainer_refuses_to_resume_from_another_subset(tmp_path):
    saving_trainer(attached("bert", "row"), tmp_path, 2).train()
    trainer = saving_trainer(attached("bert", "element"), tmp_path, 4)
    with pytest.raises(AdapeftError, match="trained with another subset"):
        trainer.train(resume_from_checkpoint=True)


def test_an_incomplete_state_dict_is_refused_and_an_empty_one_writes_nothing(tmp_path):
    model = attached("bert", "mixed")
    folder = tmp_path / "checkpoint-3"
    model.save_pretrained(folder, is_main_process=True, state_dict={})
    state = {name: value for name, value in model.state_dict().items() if "classifier" not in name}
    with pytest.raises(AdapeftError, match="the state dict has no 'classifier"):
        model.save_pretrained(folder, is_main_process=True, state_dict=state)
    model.save_pretrained(folder, is_main_process=False, state_dict=None)
    assert not folder.exists()
