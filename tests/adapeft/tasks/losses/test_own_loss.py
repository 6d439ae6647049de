"""Tests of the measured loss against the model's own: equal in any precision, or refused with both numbers."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import BartConfig, BartForCausalLM, BertForSequenceClassification, MixtralConfig, MixtralForCausalLM

import adapeft
from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.tasks.inference import infer_objective
from adapeft.tasks.losses.cross_entropy import Classification
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.losses.own_loss import check_own_loss
from adapeft.tasks.losses.squared_error import Regression
from tests.adapeft.tasks.losses.test_objective import LOSSES
from tests.support.tiny import VOCABULARY, make_batches, make_bert, make_gpt2


def check(model, inputs, labels) -> None:
    check_own_loss(infer_objective(model, labels), Batch(inputs, labels, torch.arange(len(labels))), model.eval())


def of(model) -> tuple[dict, torch.Tensor]:
    batch = make_batches(model)[0]
    return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LOSSES)
def test_losses_that_are_known_agree(case, dtype):
    make, inputs, labels, *_ = LOSSES[case]
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    if dtype == torch.bfloat16 and case == "whole-numbers-as-targets":
        pytest.skip("transformers itself needs targets of the logits' type")
    check(make().to(dtype), inputs, labels)


def test_a_confident_model_agrees_within_the_rounding_of_its_logits():
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(300)
        model.transformer.ln_f.bias.mul_(300)
    inputs, labels = of(model)
    logits = model.eval()(**inputs).logits
    confident = torch.full_like(labels, IGNORED)
    confident[:, 1:] = logits.argmax(-1)[:, :-1]
    loss = model(**inputs, labels=confident).loss.item()
    assert loss < 0.05 * float(logits.detach().abs().max())
    check(model, inputs, confident)


class Smoothed(BertForSequenceClassification):
    """Model trained with label smoothing."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits, labels, label_smoothing=0.1)
        return output


class Weighted(BertForSequenceClassification):
    """Model trained with class weights."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))
        return output


class Summed(BertForSequenceClassification):
    """Model whose loss is not a mean."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        output = super().forward(input_ids, attention_mask)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits, labels, reduction="sum")
        return output


def make_mixture(**options) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=VOCABULARY, intermediate_size=16, num_local_experts=2, **sizes, **options)
    )


def make_unshifted() -> BartForCausalLM:
    """Return a causal language model whose labels are not shifted."""
    torch.manual_seed(0)
    sizes = {"d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 10}
    return BartForCausalLM(BartConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes))


OTHERS = {
    "label-smoothing": lambda: Smoothed(make_bert().config),
    "class-weights": lambda: Weighted(make_bert().config),
    "sum": lambda: Summed(make_bert().config),
    "router-loss": lambda: make_mixture(output_router_logits=True, router_aux_loss_coef=0.1),
    "labels-not-shifted": make_unshifted,
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("method", ["adapeft", "fish"])
def test_another_loss_is_refused_with_both_numbers(case, method):
    torch.manual_seed(1)
    model = OTHERS[case]()
    inputs, labels = of(model)
    batches = [{**inputs, "labels": labels}] * 4
    with pytest.raises(AdapeftError, match="Usual causes: ") as caught:
        adapeft.select(model, batches, method=method, budget="5%")
    own, ours = (float(number) for number in re.findall(r" is (\d+\.\d+)", str(caught.value))[:2])
    assert own != ours
    with torch.no_grad():
        assert own == pytest.approx(float(model.eval()(**inputs, labels=labels).loss), rel=1e-5)


def test_a_mixture_without_its_auxiliary_loss_agrees():
    model = make_mixture()
    check(model, *of(model))


def test_methods_that_measure_no_loss_need_not_agree():
    torch.manual_seed(1)
    model = Smoothed(make_bert().config)
    inputs, labels = of(model)
    batches = [{**inputs, "labels": labels}] * 2
    for method in ("random", "magnitude", "bitfit"):
        assert adapeft.select(model, batches, method=method, budget="10%").count > 0


def test_several_labels_for_each_example():
    """The number of labels may equal the number of tokens."""
    model = make_bert()
    inputs, _ = of(model)
    for labels in (torch.ones(5, 3), torch.ones(5, 9), torch.ones(5, 9, dtype=torch.long)):
        with pytest.raises(AdapeftError, match="labels of shape"):
            adapeft.select(model, [{**inputs, "labels": labels}] * 2, budget=100)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda logits, loss: SimpleNamespace(logits=logits, loss=None), "Answering returns no loss for a batch with"),
        (lambda logits, loss: SimpleNamespace(logits=logits), "Answering returns no loss for a batch with labels"),
        (lambda logits, loss: SimpleNamespace(logits=logits, loss=logits), r"returns tensor\([\s\S]* as its loss"),
        (lambda logits, loss: (loss, logits), "Answering returns a tuple, whose values cannot be read"),
        (lambda logits, loss: {"loss": loss, "scores": logits}, "no logits, only 'loss', 'scores'"),
        (lambda logits, loss: SimpleNamespace(logits=(logits, logits), loss=loss), "logits of shape tuple for labels"),
        (
            lambda logits, loss: SimpleNamespace(logits=logits[:, :, None], loss=loss),
            r"logits of shape \[5, 3, 1\] for",
        ),
        (
            lambda logits, loss: SimpleNamespace(logits=logits if loss is None else -logits, loss=loss),
            "computes different logits with labels than without",
        ),
        (
            lambda logits, loss: SimpleNamespace(logits=torch.rand_like(logits), loss=loss),
            "computes different logits each time for the same batch",
        ),
        (
            lambda logits, loss: {"loss": loss, "logits": logits},
            "Answering returns a dict, whose values cannot be read",
        ),
    ],
)
def test_models_that_answer_otherwise(output, message):
    class Answering(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None):
            given = super().forward(input_ids, attention_mask, labels=labels)
            return output(given.logits, given.loss)

    torch.manual_seed(1)
    model = Answering(make_bert().config)
    with pytest.raises(AdapeftError, match=message):
        check(model, *of(model))


def test_labels_that_the_model_cannot_take():
    model = make_bert()
    inputs, _ = of(model)
    batch = Batch(inputs, torch.zeros(5), torch.arange(5))
    with pytest.raises(AdapeftError, match=r"logits of shape \[5, 3\] for labels of shape \[5\], which do not"):
        check_own_loss(Regression(), batch, model)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(AdapeftError, match="fails to compute its loss for the first batch"):
        check_own_loss(Classification(), Batch(inputs, torch.zeros(5, dtype=torch.long), torch.arange(5)), model)


def test_the_config_is_as_before():
    model = make_bert()
    assert model.config.problem_type is None
    adapeft.select(model, make_batches(model), budget=100, warmup_steps=0)
    assert model.config.problem_type is None


def test_what_is_not_finite_is_reported_by_others():
    model = make_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(torch.nan)
    inputs, labels = of(model)
    check(model, inputs, labels)
