"""Losses against transformers' own, and sampled labels against the exact Gauss-Newton matrix of a linear model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import grad, vmap
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from adapeft.errors import AdapeftError
from adapeft.inputs.data import Batch
from adapeft.inputs.objective import IGNORED, Classification, NextToken, Regression, infer_objective
from tests.oracles import num_predictions
from tests.tiny import VOCABULARY, make_batches, make_bert, make_gpt2


def make_regressor() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=1, **sizes))


@pytest.mark.parametrize(
    ("make", "objective"), [(make_bert, Classification()), (make_gpt2, NextToken()), (make_regressor, Regression())]
)
def test_loss_sum_is_the_loss_of_transformers_times_its_predictions(make, objective):
    model = make().eval()
    batch = make_batches(model)[0]
    if isinstance(objective, Regression):
        batch["labels"] = batch["labels"].float() - 0.7
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = objective.forward(model, Batch(inputs, labels, torch.arange(5)))
    assert objective.num_predictions(labels) == num_predictions(batch)
    expected = model(**batch).loss * num_predictions(batch)
    torch.testing.assert_close(objective.loss_sum(logits, labels), expected, rtol=1e-6, atol=0)


def second_moment(objective, features, labels, num_samples):
    """Mean ggᵀ over sampled labels of a linear model, and the exact Hessian, which is its Gauss-Newton matrix."""
    torch.manual_seed(0)
    num_outputs = 1 if isinstance(objective, Regression) else 4
    weight = torch.randn(num_outputs, features.shape[-1], dtype=torch.float64)
    logits = features @ weight.t()
    many = Batch({}, labels.expand(num_samples, *labels.shape[1:]), torch.arange(num_samples))
    draws = objective.sample_labels(logits.expand(num_samples, *logits.shape[1:]), many, seed=5)

    def loss(weight, label):
        return objective.loss_sum(features @ weight.t(), label[None])

    scores = vmap(grad(loss), (None, 0))(weight, draws).flatten(1)
    exact = torch.autograd.functional.hessian(lambda w: loss(w, labels[0]), weight).reshape(scores.shape[1], -1)
    return scores.t() @ scores / num_samples, exact


@pytest.mark.parametrize(
    ("objective", "features", "labels"),
    [
        (Classification(), (1, 3), [2]),
        (Regression(), (1, 3), [0.3]),
        (NextToken(), (1, 6, 3), [[1, 0, 3, 2, IGNORED, IGNORED]]),
        (NextToken(), (1, 6, 3), [[IGNORED, IGNORED, 3, IGNORED, 1, 1]]),
    ],
    ids=["classes", "regression", "tokens-padded-right", "tokens-masked"],
)
def test_sampled_gradients_have_the_gauss_newton_matrix_as_second_moment(objective, features, labels):
    features = torch.randn(features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    errors = []
    for num_samples in (400, 25_600):
        estimate, exact = second_moment(objective, features, torch.tensor(labels), num_samples)
        errors.append(float((estimate - exact).norm() / exact.norm()))
    assert errors[1] < 0.03, "64 times the samples bring it within a few per cent"
    assert errors[1] < errors[0]


def test_regression_has_twice_the_gram_matrix():
    features = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    estimate, exact = second_moment(Regression(), features, torch.tensor([0.0]), 25_600)
    torch.testing.assert_close(exact, 2 * features.t() @ features, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(estimate, exact, rtol=0.03, atol=0)


@pytest.mark.parametrize("objective", [Classification(), Regression(), NextToken()])
def test_a_label_depends_on_its_example_and_the_seed_alone(objective):
    torch.manual_seed(0)
    is_text = isinstance(objective, NextToken)
    logits = torch.randn(7, 6, 11) if is_text else torch.randn(7, 1 if isinstance(objective, Regression) else 11)
    labels = torch.randint(0, 11, (7, 6)) if is_text else torch.zeros(7)
    ids = torch.tensor([3, 900, 17, 4, 2**40, 0, 5])

    def draw(rows, seed=1):
        return objective.sample_labels(logits[rows], Batch({}, labels[rows], ids[rows]), seed)

    together = draw(torch.arange(7))
    shuffled = torch.tensor([5, 2, 6, 0])
    assert torch.equal(draw(shuffled), together[shuffled])
    assert torch.equal(draw(torch.tensor([4])), together[4:5])
    assert not torch.equal(draw(torch.arange(7), seed=2), together)
    alike = objective.sample_labels(logits[:1].expand_as(logits), Batch({}, labels, ids), 1)
    assert len(alike.reshape(7, -1).unique(dim=0)) > 1, "examples of equal logits share their draws"


def test_padding_changes_no_label_and_gets_none():
    torch.manual_seed(0)
    logits = torch.randn(2, 8, 11)
    labels = torch.tensor([[1, 2, 3, 4, 5, -100, -100, -100], [1, 2, 3, 4, 5, 6, 7, 8]])
    ids = torch.tensor([6, 7])
    padded = NextToken().sample_labels(logits, Batch({}, labels, ids), seed=0)
    bare = NextToken().sample_labels(logits[:1, :5], Batch({}, labels[:1, :5], ids[:1]), seed=0)
    assert torch.equal(padded[0, :5], bare[0])
    assert torch.equal(padded == IGNORED, labels == IGNORED)


def test_labels_are_sampled_from_logits_of_any_precision():
    logits = torch.tensor([[0.0, 30.0, 0.0]]).expand(50, 3)
    for dtype in (torch.bfloat16, torch.float64):
        draws = Classification().sample_labels(logits.to(dtype), Batch({}, torch.zeros(50), torch.arange(50)), 0)
        assert draws.tolist() == [1] * 50


def test_infers_what_transformers_would_use(bert, gpt2):
    tokens = torch.ones(2, 5, dtype=torch.long)
    one_label = copy.deepcopy(bert)
    one_label.config.num_labels = 1
    assert isinstance(infer_objective(bert, {"input_ids": tokens}, torch.tensor([0, 1])), Classification)
    assert isinstance(infer_objective(bert, {"input_ids": tokens}, torch.tensor([0.0, 1.5])), Regression)
    assert isinstance(infer_objective(one_label, {"input_ids": tokens}, torch.tensor([0, 4])), Regression)
    assert isinstance(infer_objective(gpt2, {"input_ids": tokens}, tokens), NextToken)


def test_refuses_losses_it_does_not_know(bert):
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    with pytest.raises(AdapeftError, match=r"labels of shape \[2, 3\]"):
        infer_objective(bert, inputs, torch.zeros(2, 3))
    masked = BertForMaskedLM(BertConfig(vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(AdapeftError, match="ForMaskedLM"):
        infer_objective(masked, inputs, inputs["input_ids"])
