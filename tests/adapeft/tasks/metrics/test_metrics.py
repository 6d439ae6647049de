"""Tests of metrics against scikit-learn and SciPy or by hand, and of merging ranks."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from adapeft.data.description import DataDescription
from adapeft.errors import AdapeftError
from adapeft.tasks.metrics.metrics import Scorer
from adapeft.tasks.registry import TASKS

TARGETS = DataDescription(0, 0, None, problem_type="regression", num_labels=1)
TOKENS = DataDescription(0, 0, None, problem_type=None, num_labels=0)


def classes(num_labels: int) -> DataDescription:
    return DataDescription(0, 0, None, problem_type="single_label_classification", num_labels=num_labels)


DESCRIPTIONS = {"single_label_classification": classes(2), "regression": TARGETS, None: TOKENS}


def score(description: DataDescription, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    scorer = Scorer(TASKS["sequence-classification"].metrics(description))
    for part in torch.arange(len(labels)).split(7):
        scorer.update(logits[part], labels[part], loss_sum=2.0 * len(part), predicted=every(len(part)))
    return scorer.compute()


def every(num_labels: int) -> torch.Tensor:
    """Return a mask by which all labels are predicted."""
    return torch.ones(num_labels, dtype=torch.bool)


def one_hot(predictions: list[int], num_outputs: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), num_outputs).float()


@pytest.mark.parametrize("num_labels", [2, 3, 5])
def test_classes_against_scikit_learn(num_labels):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(num_labels)
    labels = torch.randint(num_labels, (101,), generator=generator)
    logits = torch.randn(101, num_labels, generator=generator) + torch.nn.functional.one_hot(labels, num_labels)
    predictions = logits.argmax(-1)
    scores = score(classes(num_labels), logits.bfloat16(), labels)
    f1 = sklearn_metrics.f1_score(labels, predictions, average="binary" if num_labels == 2 else "macro")
    accuracy = sklearn_metrics.accuracy_score(labels, predictions)
    assert scores == pytest.approx(
        {
            "loss": 2.0,
            "accuracy": accuracy,
            "f1": f1,
            "accuracy_f1": (accuracy + f1) / 2,
            "matthews": sklearn_metrics.matthews_corrcoef(labels, predictions),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_targets_against_scipy(dtype, scale):
    """Includes ties and predictions as similar as those of a fresh head."""
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(11, (200,), generator=generator) / 2
    logits = ((labels + torch.randn(200, generator=generator)) * scale).to(dtype).unsqueeze(-1)
    scores = score(TARGETS, logits, labels)
    predictions = logits.squeeze(-1).double()
    pearson, spearman = stats.pearsonr(predictions, labels)[0], stats.spearmanr(predictions, labels)[0]
    assert scores == pytest.approx(
        {"loss": 2.0, "pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
    )


def test_many_ties_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200_000,), generator=generator).double()
    predictions = labels + torch.randn(200_000, generator=generator).double()
    scorer = Scorer(TASKS["sequence-classification"].metrics(TARGETS))
    scorer.update(predictions, labels, 1.0, every(len(labels)))
    assert scorer.compute()["spearman"] == pytest.approx(stats.spearmanr(predictions, labels)[0], abs=1e-12)


def test_classes_by_hand():
    # Of class 1: 3 true and 1 false positives, 2 false and 4 true negatives.
    labels = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    scores = score(classes(2), one_hot([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], 2), labels)
    assert scores["accuracy"] == pytest.approx(0.7)
    assert scores["f1"] == pytest.approx(6 / 9)
    assert scores["matthews"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))


@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("prediction", [0, 1])
def test_one_class_alone_has_no_correlation(labels, prediction):
    scores = score(classes(2), one_hot([prediction] * 4, 2), torch.tensor(labels))
    assert scores["matthews"] == 0.0
    assert all(math.isfinite(value) for value in scores.values())


def test_constant_targets_or_predictions_have_no_correlation():
    assert score(TARGETS, torch.ones(4, 1), torch.arange(4.0))["pearson_spearman"] == 0.0
    assert score(TARGETS, torch.arange(4.0), torch.ones(4))["spearman"] == 0.0


@pytest.mark.filterwarnings("ignore:The variance of predictions")
def test_predictions_that_diverged_show():
    with pytest.raises(
        AdapeftError, match="the metric 'pearson' is nan, because the model's predictions are not finite"
    ):
        score(TARGETS, torch.tensor([[1.0], [math.nan], [3.0]]), torch.arange(3.0))


@pytest.mark.parametrize(("task", "loss"), [("causal-lm", math.nan), ("causal-lm", math.inf)])
def test_a_loss_that_is_no_number_is_no_score(task, loss):
    scorer = Scorer(TASKS[task].metrics(TOKENS))
    scorer.update(None, None, loss_sum=loss, predicted=every(3))
    with pytest.raises(AdapeftError, match=f"the metric 'loss' is {loss:g}"):
        scorer.compute()


def test_classes_told_from_logits_that_are_no_numbers_are_no_score():
    """``argmax`` returns class 0 for such logits, which may be the most frequent class."""
    scorer = Scorer(TASKS["sequence-classification"].metrics(classes(2)))
    logits, labels = torch.full((4, 2), math.nan), torch.zeros(4, dtype=torch.int64)
    loss_sum = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    scorer.update(logits, labels, loss_sum, every(4))
    with pytest.raises(AdapeftError, match="the metric 'loss' is nan"):
        scorer.compute()


def test_a_head_with_more_outputs_than_classes():
    labels = torch.tensor([0, 1, 1, 0])
    scores = score(classes(2), one_hot([0, 1, 2, 0], 3), labels)
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx(2 / 3)  # precision 1, recall 1/2 of class 1


def test_language_models_are_judged_by_the_token():
    scorer = Scorer(TASKS["causal-lm"].metrics(TOKENS))
    scorer.update(None, None, loss_sum=torch.tensor(6.0), predicted=every(3))
    scorer.update(None, None, loss_sum=1.0, predicted=every(4))
    assert scorer.compute() == pytest.approx({"loss": 1.0, "perplexity": math.e})


@pytest.mark.parametrize("description", [classes(3), TARGETS])
def test_what_is_not_predicted_counts_nothing(description):
    """The model's output there has no effect, and the score equals that without those rows."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(20, description.num_labels, generator=generator)
    labels = torch.randint(3, (20,), generator=generator)
    predicted = torch.rand(20, generator=generator) < 0.6
    scorer = Scorer(TASKS["sequence-classification"].metrics(description))
    scorer.update(logits, torch.where(predicted, labels, -100), 2.0 * int(predicted.sum()), predicted)
    assert scorer.compute() == pytest.approx(score(description, logits[predicted], labels[predicted]), abs=1e-12)


def test_perplexity_of_a_model_that_diverged():
    scorer = Scorer(TASKS["causal-lm"].metrics(TOKENS))
    scorer.update(None, None, loss_sum=1e4, predicted=every(1))
    assert scorer.compute()["perplexity"] == math.inf


@pytest.mark.parametrize("description", [classes(3), TARGETS])
@pytest.mark.parametrize("cuts", [(20, 20), (1, 39), (40, 0), (13, 13, 14)])
def test_ranks_merge_to_one(description, cuts):
    """Uneven shares, also an empty one, that are serialized as bytes give the result of one rank."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, description.num_labels, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    ranks = []
    for part in torch.arange(40).split(cuts):
        rank = Scorer(TASKS["sequence-classification"].metrics(description))
        rank.update(logits[part], labels[part], 2.0 * len(part), every(len(part)))
        ranks.append(pickle.loads(pickle.dumps(rank)))
    ranks[0].merge(ranks[1:])
    assert ranks[0].compute() == pytest.approx(score(description, logits, labels), abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "task", "problem_type", "expected"),
    [
        ("auto", "sequence-classification", "single_label_classification", ("accuracy", True)),
        ("auto", "sequence-classification", "regression", ("pearson_spearman", True)),
        ("auto", "causal-lm", None, ("loss", False)),
        ("matthews", "sequence-classification", "single_label_classification", ("matthews", True)),
        ("accuracy_f1", "sequence-classification", "single_label_classification", ("accuracy_f1", True)),
        ("loss", "sequence-classification", "regression", ("loss", False)),
        ("perplexity", "causal-lm", None, ("perplexity", False)),
    ],
)
def test_the_metric_that_decides(metric, task, problem_type, expected):
    assert TASKS[task].metrics(DESCRIPTIONS[problem_type]).primary(metric) == expected


@pytest.mark.parametrize(
    ("metric", "task", "problem_type", "message"),
    [
        (
            "accuracy",
            "causal-lm",
            None,
            "'accuracy' does not exist for causal-lm. Choose one of auto, loss, perplexity",
        ),
        (
            "matthews",
            "sequence-classification",
            "regression",
            "'matthews' does not exist for regression. Choose one of auto, pearson",
        ),
        ("acuracy", "sequence-classification", "single_label_classification", "Did you mean 'accuracy'"),
    ],
)
def test_metrics_of_another_task(metric, task, problem_type, message):
    with pytest.raises(AdapeftError, match=message):
        TASKS[task].metrics(DESCRIPTIONS[problem_type]).primary(metric)


@pytest.mark.parametrize(
    ("task", "description"),
    [("sequence-classification", classes(2)), ("sequence-classification", TARGETS), ("causal-lm", TOKENS)],
)
def test_the_metric_that_decides_is_computed(task, description):
    scorer = Scorer(TASKS[task].metrics(description))
    scorer.update(torch.zeros(2, max(description.num_labels, 1)), torch.tensor([0, 1]), 1.0, every(2))
    assert scorer.metrics.primary("auto")[0] in scorer.compute()
    assert next(iter(scorer.compute())) == "loss"
