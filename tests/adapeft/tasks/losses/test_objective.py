"""Tests of losses against transformers, and of sampled labels against the exact Gauss-Newton matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.tasks.inference import infer_objective, objective_named
from adapeft.tasks.losses.answer_spans import AnswerSpans
from adapeft.tasks.losses.cross_entropy import (
    Classification,
    MaskedTokens,
    NextToken,
    SequenceToSequence,
    TokenClasses,
)
from adapeft.tasks.losses.objective import IGNORED, Objective
from adapeft.tasks.losses.squared_error import Regression
from adapeft.tasks.multi_label_classification import IndependentLabels
from adapeft.tasks.registry import TASKS
from tests.oracles.measuring import check_curvature_of_classes, in_double
from tests.support.tiny import VOCABULARY, make_bart, make_bert, make_gpt2, make_t5, make_vit, make_whisper

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def make_regressor(num_labels: int = 1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, num_labels=num_labels, problem_type="regression", **SIZES)
    )


def make_tagger() -> BertForTokenClassification:
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **SIZES))


def make_masked() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SIZES))


def make_answerer() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    return BertForQuestionAnswering(BertConfig(vocab_size=VOCABULARY, **SIZES))


def make_labeller() -> BertForSequenceClassification:
    model = make_bert()
    model.config.problem_type = "multi_label_classification"
    return model


def drawn(*shape: int, low: int = 0, high: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(3))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


CLASSES = torch.tensor([0, IGNORED, 2, 1])
TOKENS = drawn(4, 6, low=3)
MASKED = TOKENS.clone()
MASKED[0, :3] = IGNORED  # a prompt
MASKED[1] = IGNORED  # an example that predicts nothing
MASKED[2, 1:] = IGNORED  # nor does one whose only label is that of its first token, unless a decoder reads it
TEXT = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}

# What transformers computes: model, inputs, labels; the objective, and how many predictions the mean is over.
LOSSES = {
    "classes": (make_bert, TEXT, CLASSES.clamp(min=0), Classification, 4),
    "classes-ignored": (make_bert, TEXT, CLASSES, Classification, 3),
    "images": (make_vit, {"pixel_values": floats(4, 3, 8, 8)}, CLASSES, Classification, 3),
    "target": (make_regressor, TEXT, floats(4), Regression, 4),
    "target-of-one-example": (make_regressor, {"input_ids": TOKENS[:1]}, floats(1), Regression, 1),
    "target-column": (make_regressor, TEXT, floats(4, 1), Regression, 4),
    "target-like-the-ignored-label": (make_regressor, TEXT, CLASSES.double(), Regression, 4),
    "whole-numbers-as-targets": (make_regressor, TEXT, CLASSES, Regression, 4),
    "targets": (lambda: make_regressor(3), TEXT, floats(4, 3), Regression, 12),
    "labels": (make_labeller, TEXT, drawn(4, 3, high=2).double(), IndependentLabels, 12),
    "classes-of-tokens": (make_tagger, TEXT, torch.where(MASKED == IGNORED, IGNORED, MASKED % 3), TokenClasses, 10),
    "answer-spans": (make_answerer, TEXT, drawn(4, 2, high=6), AnswerSpans, 8),
    "next-token": (make_gpt2, TEXT, TOKENS, NextToken, 20),
    "next-token-masked": (make_gpt2, TEXT, MASKED, NextToken, 8),
    "masked-tokens": (make_masked, TEXT, MASKED, MaskedTokens, 10),
    "t5": (make_t5, TEXT, MASKED, SequenceToSequence, 10),
    "t5-other-length": (make_t5, TEXT, MASKED[:, :5].contiguous(), SequenceToSequence, 8),
    "t5-decoder-input": (make_t5, {**TEXT, "decoder_input_ids": TOKENS.roll(1, 1)}, TOKENS, SequenceToSequence, 24),
    "bart": (make_bart, TEXT, MASKED, SequenceToSequence, 10),
    "speech-to-text": (make_whisper, {"input_features": floats(4, 4, 12)}, MASKED, SequenceToSequence, 10),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_and_its_mean_are_those_of_transformers(case):
    make, inputs, labels, kind, num_predictions = LOSSES[case]
    model = in_double(make())
    objective = infer_objective(model, labels)
    assert type(objective) is kind
    batch = Batch(inputs, labels, torch.arange(len(labels)))
    logits = objective.forward(model, batch)
    assert objective.fits(logits, labels)
    assert objective.num_predictions(labels) == num_predictions
    # transformers computes the loss of a language model in float32, whatever the model's precision.
    expected = model(**inputs, **objective.label_inputs(labels)).loss
    rounding = 4 * torch.finfo(expected.dtype).eps
    mean = objective.loss_sum(logits, labels) / num_predictions
    torch.testing.assert_close(
        mean, expected.double(), rtol=rounding, atol=rounding * float(logits.detach().abs().max())
    )


@pytest.mark.parametrize("case", LOSSES)
def test_sampled_labels_are_those_that_count(case):
    make, inputs, labels, *_ = LOSSES[case]
    model = in_double(make())
    objective = infer_objective(model, labels)
    batch = Batch(inputs, labels, torch.arange(len(labels)))
    sampled = objective.sample_labels(objective.forward(model, batch), batch, seed=1)
    assert sampled.shape == labels.shape
    predicted = objective.predicted(labels)
    assert torch.equal(objective.predicted(sampled), predicted)
    assert (sampled[predicted] != labels[predicted]).any()


@pytest.mark.parametrize("case", ["classes-ignored", "next-token-masked", "t5"])
def test_what_predicts_nothing_has_neither_loss_nor_gradient(case):
    make, inputs, labels, *_ = LOSSES[case]
    model = in_double(make())
    objective = infer_objective(model, labels)
    nothing = torch.full_like(labels, IGNORED)
    loss = objective.loss_sum(objective.forward(model, Batch(inputs, nothing, torch.arange(4))), nothing)
    loss.backward()
    assert objective.num_predictions(nothing) == 0
    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("make", "objective", "given"),
    [(make_t5, SequenceToSequence(), {"labels": MASKED}), (make_masked, MaskedTokens(), {})],
    ids=["decoder", "masked-tokens"],
)
def test_tokens_in_place_have_the_exact_gauss_newton_form_as_mean(make, objective, given):
    """The mean over draws of T (g̃·d)² is dᵀJᵀHJd; a decoder reads the true labels while sampled ones are predicted."""
    model = in_double(make())
    model.set_attn_implementation("eager")  # the fused kernel has no forward derivative
    labels, num_draws = MASKED, 300
    batch = Batch(TEXT, labels, torch.arange(4))
    counted = labels != IGNORED
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    along = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in weights.items()}

    def logits_at(weights):
        return functional_call(model, weights, kwargs={**TEXT, **given}).logits

    logits, change = jvp(logits_at, (weights,), (along,))
    p, u = logits[counted].softmax(-1), change[counted]
    exact = float(((p * u**2).sum(-1) - (p * u).sum(-1) ** 2).mean())

    draws = []
    parameters = [parameter for _, parameter in model.named_parameters()]
    for seed in range(num_draws):
        logits = objective.forward(model, batch)
        mean = objective.loss_sum(logits, objective.sample_labels(logits, batch, seed)) / int(counted.sum())
        # A head that the loss does not reach, such as a pooler, has no gradient.
        gradient = torch.autograd.grad(mean, parameters, materialize_grads=True)
        product = sum((g * d).sum() for g, d in zip(gradient, along.values(), strict=True))
        draws.append(int(counted.sum()) * float(product) ** 2)
    draws = torch.tensor(draws, dtype=torch.float64)
    error = float(draws.std() / num_draws**0.5)
    assert abs(float(draws.mean()) - exact) < 4 * error
    assert error < 0.1 * exact


def second_moment(objective, features, labels, num_samples):
    """Return mean ggᵀ over sampled labels of a linear model, and the exact Hessian, its Gauss-Newton matrix."""
    torch.manual_seed(0)
    num_outputs = labels.shape[-1] if isinstance(objective, Regression) else 4
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
        (Regression(), (1, 3), [[0.3, 2.0]]),
        (IndependentLabels(), (1, 3), [[1.0, 0.0, 0.0, 1.0]]),
        (TokenClasses(), (1, 4, 3), [[IGNORED, 3, 0, IGNORED]]),
        (AnswerSpans(), (1, 2, 3), [[2, 3]]),
        (NextToken(), (1, 6, 3), [[1, 0, 3, 2, IGNORED, IGNORED]]),
        (NextToken(), (1, 6, 3), [[IGNORED, IGNORED, 3, IGNORED, 1, 1]]),
        (MaskedTokens(), (1, 4, 3), [[IGNORED, 2, IGNORED, 0]]),
        (SequenceToSequence(), (1, 4, 3), [[1, IGNORED, 3, IGNORED]]),
    ],
    ids=[
        "classes",
        "regression",
        "regressions",
        "labels",
        "classes-of-tokens",
        "answer-spans",
        "tokens-padded-right",
        "tokens-masked",
        "masked-tokens",
        "decoder",
    ],
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


@pytest.mark.parametrize(
    "objective",
    [Classification(), Regression(), IndependentLabels(), TokenClasses(), NextToken(), MaskedTokens()],
)
def test_a_label_depends_on_its_example_and_the_seed_alone(objective):
    torch.manual_seed(0)
    is_text = isinstance(objective, NextToken | MaskedTokens | TokenClasses)
    logits = torch.randn(7, 6, 11) if is_text else torch.randn(7, 1 if isinstance(objective, Regression) else 11)
    labels = torch.randint(0, 11, (7, 6)) if is_text else torch.zeros(7)
    if isinstance(objective, IndependentLabels):
        labels = torch.zeros(7, 11)
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
    assert isinstance(infer_objective(bert, torch.tensor([0, 1])), Classification)
    assert isinstance(infer_objective(bert, torch.tensor([0.0, 1.5])), Regression)
    assert isinstance(infer_objective(one_label, torch.tensor([0, 4])), Regression)
    assert isinstance(infer_objective(gpt2, tokens), NextToken)
    assert isinstance(infer_objective(make_t5(), tokens), SequenceToSequence)


@pytest.mark.parametrize("labels", [torch.zeros(2, 3), torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 5, 3)])
def test_several_labels_of_a_classifier_are_not_taken_for_tokens(bert, labels):
    with pytest.raises(
        AdapeftError,
        match=r"labels of shape \[2, .*\] and type (float32|int64) are not supported: supported are classes",
    ):
        infer_objective(bert, labels)


@pytest.mark.parametrize(
    "labels", [torch.zeros(2), torch.zeros(2, dtype=torch.long), torch.ones(2, 5).long(), torch.zeros(2, 5, 3)]
)
def test_several_labels_of_an_example_are_a_row_of_floats(labels):
    with pytest.raises(
        AdapeftError,
        match=r"problem_type = .*: labels have shape \[2.* but must be floats \[n, C\]",
    ):
        infer_objective(make_labeller(), labels)


def test_every_label_is_drawn_by_itself_from_its_own_probability():
    """Means, and products of two labels, of n draws are within five standard errors, at most 5 / (2 √n)."""
    n, logits = 40_000, torch.tensor([-3.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    labels = torch.zeros(n, 4, dtype=torch.float64)
    batch = Batch({}, labels, torch.arange(n))
    draws = IndependentLabels().sample_labels(logits.expand(n, 4), batch, seed=2)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = logits.sigmoid()
    expected = torch.outer(p, p).fill_diagonal_(0) + p.diag()
    torch.testing.assert_close(draws.t() @ draws / n, expected, rtol=0, atol=5 / (2 * n**0.5))


def test_several_labels_have_the_exact_gauss_newton_form_as_mean():
    """The mean over draws of T (g̃·d)² is dᵀJᵀHJd, with H = p (1 - p) of every label, of a whole model in float64."""
    model = in_double(make_labeller())
    model.set_attn_implementation("eager")  # the fused kernel has no forward derivative
    labels, num_draws = drawn(4, 3, high=2).double(), 400
    batch, objective = Batch(TEXT, labels, torch.arange(4)), IndependentLabels()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    along = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in weights.items()}

    logits, change = jvp(lambda weights: functional_call(model, weights, kwargs=TEXT).logits, (weights,), (along,))
    p = logits.sigmoid()
    exact = float((p * (1 - p) * change**2).mean())

    draws = []
    parameters = [parameter for _, parameter in model.named_parameters()]
    for seed in range(num_draws):
        logits = objective.forward(model, batch)
        mean = objective.loss_sum(logits, objective.sample_labels(logits, batch, seed)) / labels.numel()
        gradient = torch.autograd.grad(mean, parameters)
        product = sum((g * d).sum() for g, d in zip(gradient, along.values(), strict=True))
        draws.append(labels.numel() * float(product) ** 2)
    draws = torch.tensor(draws, dtype=torch.float64)
    error = float(draws.std() / num_draws**0.5)
    assert abs(float(draws.mean()) - exact) < 4 * error
    assert error < 0.1 * exact


def test_no_gradient_flows_through_sampled_labels():
    logits = torch.randn(3, 4, requires_grad=True)
    draws = IndependentLabels().sample_labels(logits, Batch({}, torch.zeros(3, 4), torch.arange(3)), seed=0)
    assert not draws.requires_grad


def test_answer_spans_have_the_exact_gauss_newton_form_as_mean():
    model = in_double(make_answerer())
    model.set_attn_implementation("eager")  # the fused kernel has no forward derivative
    batch = Batch(TEXT, drawn(4, 2, high=6), torch.arange(4))
    check_curvature_of_classes(model, AnswerSpans(), batch, reaches_all=False)


def test_refuses_losses_it_does_not_know():
    tokens = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(AdapeftError, match=r"labels of shape \[2, 5\] do not fit .* needs start_positions and end_"):
        infer_objective(make_answerer(), tokens)
    model = make_bert()
    model.loss_type = "ForObjectDetection"
    with pytest.raises(
        AdapeftError, match=r"the loss 'ForObjectDetection' of this model is unknown.*loss= with the name"
    ):
        infer_objective(model, tokens)


@pytest.mark.parametrize(
    ("name", "make", "labels", "kind"),
    [
        ("sequence-classification", make_bert, CLASSES, Classification),
        ("sequence-classification", make_bert, floats(4), Regression),
        ("sequence-classification", make_regressor, CLASSES, Regression),
        ("token-classification", make_gpt2, TOKENS, TokenClasses),
        ("causal-lm", make_masked, TOKENS, NextToken),
        ("multi-label-classification", make_bert, floats(4, 3), IndependentLabels),
    ],
)
def test_a_task_by_name(name, make, labels, kind):
    assert type(objective_named(name, make(), labels)) is kind


def test_every_task_has_an_objective_by_name():
    for name in TASKS:
        assert isinstance(objective_named(name, make_bert(), CLASSES), Objective)
    with pytest.raises(AdapeftError, match=r"loss = 'token-clasification' is not a task.*Did you mean 'token-class"):
        objective_named("token-clasification", make_bert(), CLASSES)
