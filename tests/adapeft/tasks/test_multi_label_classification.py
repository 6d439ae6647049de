"""Tests of several labels per example: accepted columns, tensors, scores, the model and its delta."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

import adapeft
from adapeft.data.description import DataDescription
from adapeft.data.labels import Head
from adapeft.data.sources import rows_of
from adapeft.errors import AdapeftError
from adapeft.model.load import describe_model, label_options
from adapeft.tasks.describe import describe
from adapeft.tasks.metrics.metrics import Scorer
from adapeft.tasks.multi_label_classification import IndependentLabels, MultiLabelData
from adapeft.tasks.registry import TASKS
from tests.support.tiny import VOCABULARY, make_bert

TASK = TASKS["multi-label-classification"]
NAMED = [["b", "a"], [], ["c"], ["a"]]
NUMBERED = [[1, 0], [], [2], [0]]
EXPECTED = [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes rows with one text each to a JSON lines or Parquet file and returns its path."""

    def write(columns, features=None, name="a"):
        rows = {"text": [f"w{index}" for index in range(len(next(iter(columns.values()))))], **columns}
        path = tmp_path / f"{name}.{'jsonl' if features is None else 'parquet'}"
        if features is None:
            lines = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            features = datasets.Features({"text": datasets.Value("string"), **features})
            datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        return str(path)

    return write


def keys(train, evaluation=None, **more):
    return MultiLabelData(train=train, evaluation=evaluation or train, **more)


def tensor_of(data, description):
    return TASK.label_tensor(rows_of(data, "data.train"), data, description).tolist()


@pytest.mark.parametrize(
    ("columns", "features", "label", "names"),
    [
        ({"label": NAMED}, None, "label", ("a", "b", "c")),
        ({"label": NUMBERED}, None, "label", None),
        ({"label": [[20, 10], [], [30], [10]]}, None, "label", ("10", "20", "30")),
        (
            {"label": NUMBERED},
            {"label": datasets.List(datasets.ClassLabel(names=["x", "y", "z"]))},
            "label",
            ("x", "y", "z"),
        ),
        (
            {"z": [1, 0, 0, 1], "y": [1, 0, 0, 0], "x": [False, False, True, False]},
            None,
            ("z", "y", "x"),
            ("z", "y", "x"),
        ),
    ],
    ids=["names", "numbers", "other-numbers", "named-classes", "columns"],
)
def test_labels_as_columns_hold_them(write, columns, features, label, names):
    data = keys(write(columns, features), label=label)
    description = describe(TASK, data)
    assert description == DataDescription(4, 4, names, "multi_label_classification", 3)
    assert tensor_of(data, description) == EXPECTED


def test_columns_of_a_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,rude,kind\na,1,0\nb,0,0\nc,1,1\n")
    data = keys(str(path), label=["rude", "kind"])
    description = describe(TASK, data)
    assert description.label_names == ("rude", "kind")
    assert tensor_of(data, description) == [[1, 0], [0, 0], [1, 1]]


def test_evaluation_is_numbered_as_training_is(write):
    data = keys(write({"label": NAMED}), write({"label": [["c"], ["a", "b"]]}, name="b"))
    rows = rows_of(data, "data.evaluation")
    assert TASK.label_tensor(rows, data, describe(TASK, data)).tolist() == [[0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize("label", ["label", ("c", "a", "b")])
def test_a_trained_head_numbers_the_labels(write, label):
    columns = {"label": NAMED, "a": [1, 0, 0, 1], "b": [1, 0, 0, 0], "c": [0, 0, 1, 0]}
    data = keys(write(columns), label=label)
    description = describe(TASK, data, Head(4, ("d", "c", "b", "a")))
    assert (description.label_names, description.num_labels) == (("d", "c", "b", "a"), 4)
    assert tensor_of(data, description) == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


def test_the_hash_knows_which_row_has_a_label(write):
    hashes = {describe(TASK, keys(write({"label": labels}))).content["data.train"] for labels in (NAMED, NAMED[::-1])}
    apart = [["a"], ["b"], ["c"]], [["a", "b"], [], ["c"]]
    hashes |= {describe(TASK, keys(write({"label": labels}))).content["data.train"] for labels in apart}
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("columns", "label", "message"),
    [
        ({"label": [["a", "a"], ["b"]]}, "label", r"row 0 .* has \['a', 'a'\], not a list of distinct labels"),
        ({"label": [["a"], None]}, "label", "row 1 .* has None, not a list of distinct labels"),
        ({"label": [["a"], ["b", " "]]}, "label", "row 1 .* not a list of distinct labels"),
        ({"label": [[1], [-1, 0]]}, "label", r"row 1 .* has \[-1, 0\], not a list of distinct labels"),
        (
            {"label": ["a", "b"]},
            "label",
            "has type .*. Labels must be lists of names or of integers, or several columns",
        ),
        ({"label": [[0.5], [1.0]]}, "label", "Labels must be lists of names or of integers"),
        ({"label": [["a"], ["a"]]}, "label", "data.train has only one label, 'a'. Give at least two"),
        ({"label": [["a"], ["a ", "b"]]}, "label", "differ only by spaces"),
        ({"a": [0, 1], "b": [0, 2]}, ("a", "b"), "data.label = 'b': row 1 .* has 2, neither 0 nor 1"),
        ({"a": [0, 1], "b": [0, None]}, ("a", "b"), "data.label = 'b': row 1 .* has None, neither 0 nor 1"),
        ({"a": [0, 1]}, ("a", "b"), "data.label = 'b': data.train has no such column"),
        ({"a": [0, 1]}, ("a", "a"), "data.label = 'a': is also data.label"),
    ],
)
def test_refused_labels(write, columns, label, message):
    with pytest.raises(AdapeftError, match=message):
        describe(TASK, keys(write(columns), label=label))


def test_labels_of_the_evaluation_data_alone_are_refused(write):
    data = keys(write({"label": NAMED}), write({"label": [["d"], []]}, name="b"))
    with pytest.raises(AdapeftError, match=r"data.evaluation has labels that data.train does not: 'd'"):
        describe(TASK, data)


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator)
    labels = ((logits > 0) ^ (torch.rand(50, 4, generator=generator) < 0.1)).float()
    description = DataDescription(50, 50, None, "multi_label_classification", 4)
    scorer, other = (Scorer(TASK.metrics(description)) for _ in range(2))
    for part, into in ((slice(0, 20), scorer), (slice(20, 50), other)):
        objective = TASK.objective(description)
        loss = objective.loss_sum(logits[part], labels[part])
        into.update(logits[part], labels[part], loss, objective.predicted(labels[part]))
    scorer.merge([other])
    scores = scorer.compute()
    assert list(scores) == ["loss", "micro_f1", "accuracy"]
    predicted = (logits > 0).long()
    assert scores["micro_f1"] == pytest.approx(f1_score(labels, predicted, average="micro"), abs=1e-6)
    assert scores["accuracy"] == pytest.approx(accuracy_score(labels, predicted), abs=1e-6)
    mean = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert scores["loss"] == pytest.approx(float(mean), rel=1e-6)
    assert TASK.metrics(description).primary("auto") == ("micro_f1", True)


def test_the_head_and_the_problem_are_those_of_the_labels(write):
    options = label_options(TASK.name, describe(TASK, keys(write({"label": NAMED}))))
    assert options["num_labels"] == 3
    assert options["problem_type"] == "multi_label_classification"
    assert options["id2label"] == {0: "a", 1: "b", 2: "c"}


def test_a_model_says_which_of_the_tasks_with_its_class_it_is_for():
    model = make_bert()
    assert describe_model(model)["task"] == "sequence-classification"
    model.config.problem_type = "multi_label_classification"
    assert describe_model(model)["task"] == "multi-label-classification"


def test_the_library_measures_what_transformers_trains():
    model = make_bert()
    model.config.problem_type = "multi_label_classification"
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(0, VOCABULARY, (4, 6), generator=generator),
            "labels": torch.randint(0, 2, (4, 3), generator=generator).float(),
        }
        for _ in range(4)
    ]
    assert 0 < adapeft.select(model, batches, budget=100, warmup_steps=0).count <= 100
    batches[3]["labels"][0, 0] = -100.0
    with pytest.raises(AdapeftError, match=r"labels of batch 3 .*: -100.0 is outside 0 and 1 \(1 such labels"):
        adapeft.select(model, batches, budget=100, warmup_steps=0)


def test_memory_is_counted_with_a_label_for_every_output():
    labels = IndependentLabels().any_labels(torch.zeros(2, 5, dtype=torch.long), 3)
    assert (labels.shape, labels.dtype) == ((2, 3), torch.float32)
