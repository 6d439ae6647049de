"""A delta from the library describes its model well enough to merge and export it, or the error says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import adapeft
from adapeft import AdapeftError, Delta
from adapeft.model.structure import new_parameters
from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from tests.oracles.leaves import logits, train
from tests.support.tiny import make_bert, make_gpt2

ROWS = {
    "bert": ("bert.pooler.dense.weight", Rows((12, 12), torch.tensor([1, 5]))),
    "gpt2": ("transformer.h.0.attn.c_attn.weight", Rows((12, 36), torch.tensor([1, 5]), 1)),
}


def trained(model: PreTrainedModel, name: str) -> PreTrainedModel:
    new = new_parameters(model)
    adapeft.attach(model, Subset(dict([ROWS[name]]), new, new))
    train(model)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"num_labels": 3},
        {"num_labels": 3, "id2label": {0: "no", 1: "so", 2: "yes"}, "label2id": {"no": 0, "so": 1, "yes": 2}},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ],
    ids=["numbers", "names", "several"],
)
def test_a_classifier_is_merged_and_exported_with_its_labels(options, tmp_path):
    make_bert().bert.save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    if "problem_type" in options:
        new = new_parameters(model)
        adapeft.attach(model, Subset(dict([ROWS["bert"]]), new, new))
        model(input_ids=torch.tensor([[1, 2]]), labels=torch.ones(1, 3)).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    else:
        trained(model, "bert")
    adapeft.delta(model).save(tmp_path / "delta.safetensors")
    found = Delta.load(tmp_path / "delta.safetensors")
    assert found.description["model"]["name"] == str(tmp_path / "base")
    adapeft.merge(found, str(tmp_path / "base"), tmp_path / "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert loaded.config.id2label == model.config.id2label
    assert loaded.config.problem_type == model.config.problem_type
    assert adapeft.save_for_peft(found, str(tmp_path / "base"), tmp_path / "peft") == [tmp_path / "peft"]


def test_a_regression_stays_one(tmp_path):
    make_bert().bert.save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    new = new_parameters(model)
    adapeft.attach(model, Subset(dict([ROWS["bert"]]), new, new))
    with pytest.warns(UserWarning, match=r"has changed since adapeft\.attach"):
        found = adapeft.delta(model)
    adapeft.merge(found, str(tmp_path / "base"), tmp_path / "merged")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.problem_type == "regression"


def test_a_language_model_is_merged_and_what_its_maker_says_comes_first(tmp_path):
    make_gpt2().save_pretrained(tmp_path / "base")
    model = trained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), "gpt2")
    said = adapeft.delta(model, {"method": "mine"}).description
    assert said["method"] == "mine"
    assert said["model"] == {
        "name": str(tmp_path / "base"),
        "architecture": "GPT2LMHeadModel",
        "task": "causal-lm",
        "labels": {},
    }
    adapeft.merge(adapeft.delta(model), str(tmp_path / "base"), tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    own = {"model": {"name": "mine", "task": "causal-lm", "labels": {}}}
    assert adapeft.delta(model, own).description == own


def test_a_model_of_another_task_says_what_can_be_done_and_that_can(tmp_path):
    make_bert().bert.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = BertForNextSentencePrediction.from_pretrained(tmp_path / "base")
    name, part = "bert.encoder.layer.1.output.dense.weight", Rows((12, 19), torch.tensor([1, 5]))
    adapeft.attach(model, Subset({name: part}, new_parameters(model), new_parameters(model)))
    ids = torch.tensor([[3, 4, 5], [3, 5, 4]])
    model(input_ids=ids, labels=torch.tensor([1, 0])).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    adapeft.delta(model).save(tmp_path / "delta.safetensors")
    found = Delta.load(tmp_path / "delta.safetensors")
    for call in (adapeft.merge, adapeft.save_for_peft):
        with pytest.raises(AdapeftError, match=r"on a BertForNextSentencePrediction.*apply\(model\).*save_pretrained"):
            call(found, str(tmp_path / "base"), tmp_path / "out")
    fresh = BertForNextSentencePrediction.from_pretrained(tmp_path / "base")
    found.apply(fresh)
    fresh.save_pretrained(tmp_path / "out")
    loaded = BertForNextSentencePrediction.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_module_without_a_config_has_a_delta_too(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    adapeft.attach(model, Subset({"0.weight": Rows((4, 4), torch.tensor([2]))}))
    model(torch.ones(2, 4)).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    adapeft.delta(model).save(tmp_path / "delta.safetensors")
    fresh = nn.Sequential(nn.Linear(4, 4))
    fresh.load_state_dict({f"0.{name}": value for name, value in adapeft.detach(model)[0].state_dict().items()})
    Delta.load(tmp_path / "delta.safetensors").apply(fresh)
    assert not torch.equal(fresh[0].weight, model[0].weight)
