"""Labels map to outputs by name, and by number only where there are no names."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel

from adapeft.data.description import DataDescription
from adapeft.data.labels import MOST_CLASSES_OF_FEW, Head, class_numbers
from adapeft.data.sources import rows_of
from adapeft.deltas.delta import Delta
from adapeft.deltas.extract import extract_delta
from adapeft.errors import AdapeftError
from adapeft.model.load import label_options, load_model_config, load_tokenizer, trained_head
from adapeft.model.section import Model
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tasks.describe import describe
from adapeft.tasks.registry import TASKS
from adapeft.tasks.sequence_classification import ClassificationData
from adapeft.tune.attach import attach, detach
from tests.adapeft.model.test_load import save_tokenizer

BERT = {
    "vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 19,
    "max_position_embeddings": 16,
}  # fmt: skip
SENTIMENT = Head(2, ("positive", "negative"))
TASK = "sequence-classification"
HEAD = ("classifier.weight", "classifier.bias")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, name: str, labels: list, declared: list[str] | None = None) -> str:
    """Write a file of these labels and return its path; with ``declared``, a Parquet file of named classes."""
    if declared is None:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
        return str(path)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=declared)})
    path = folder / f"{name}.parquet"
    rows = {"text": ["a"] * len(labels), "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def numbered(train: str, evaluation: str, head: Head | None = None) -> tuple[DataDescription, list[int], list[int]]:
    """Return the description and the class numbers of both splits."""
    data = ClassificationData(train=train, evaluation=evaluation)
    found = describe(TASKS[TASK], data, head)
    of = [
        class_numbers(rows_of(data, split), "label", found.label_names) for split in ("data.train", "data.evaluation")
    ]
    return found, of[0], of[1]


@pytest.mark.parametrize(
    ("labels", "head", "numbers"),
    [
        (["negative", "positive"], SENTIMENT, [1, 0]),
        (["NEGATIVE", "Positive"], SENTIMENT, [1, 0]),
        (["c", "a"], Head(3, ("b", "c", "a")), [1, 2]),
        (["LABEL_1", "LABEL_0"], Head(2, None), [1, 0]),
        ([True, False], Head(2, ("True", "False")), [0, 1]),
        ([True, False], Head(2, ("true", "false")), [0, 1]),
        ([True, False], Head(2, None), [1, 0]),
        ([0, 1], SENTIMENT, [0, 1]),
        ([5, 1, 2, 3, 4], Head(5, ("5", "4", "3", "2", "1")), [0, 4, 3, 2, 1]),
        ([1, 3], Head(4, None), [1, 3]),
    ],
)
def test_a_trained_head_numbers_the_classes(tmp_path, labels, head, numbers):
    path = write(tmp_path, "a", labels)
    description, train, evaluation = numbered(path, path, head)
    assert train == evaluation == numbers
    assert description.num_labels == head.num_outputs


@pytest.mark.parametrize(
    ("labels", "head", "message"),
    [
        (
            ["good", "bad"],
            SENTIMENT,
            r"the classes 'good', 'bad', but the head of model.name has 'positive', 'negative'",
        ),
        (["positive", "neutral", "negative"], SENTIMENT, r"'neutral'.* but the head of model.name has 'positive'"),
        (["good", "bad"], Head(2, None), r"'good', 'bad', but the head of model.name has 2 outputs without names"),
        ([0, 1, 2], SENTIMENT, r"3 classes, but the head of model.name has 2 outputs \('positive', 'negative'\)"),
        ([0, 1], Head(3, ("a", "b", "c")), r"2 classes, but the head of model.name has 3 outputs"),
        ([0, 4], Head(5, ("1", "2", "3", "4", "5")), r"'0', '4', but the head of model.name has '1', '2', '3'"),
        (["Positive", "positive", "negative"], SENTIMENT, r"'Positive', 'positive', 'negative', but"),
        ([True, False], Head(3, None), "2 classes, but the head of model.name has 3 outputs"),
        ([0, 1], Head(1, None), "2 classes, but the head of model.name has 1 output, for targets"),
    ],
)
def test_labels_that_disagree_with_a_trained_head_are_refused_with_both(tmp_path, labels, head, message):
    path = write(tmp_path, "a", labels)
    with pytest.raises(AdapeftError, match=message):
        numbered(path, path, head)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0.5", "1.5", "1"], "are numbers written as strings, such as '0.5', and each would become a class"),
        (["1.0", "2.0"], "numbers written as strings, such as '1.0'"),
        (["0,5", "1,5"], "numbers written as strings, such as '0,5'"),
        (["+0.5", "-1.5", "1"], r"numbers written as strings, such as '\+0.5'"),
        (["1,000", "2,500"], "numbers written as strings, such as '1,000'"),
        (["5%", "7 %"], "numbers written as strings, such as '5%'"),
        (["1e-3", ".5"], "numbers written as strings, such as '.5'"),
        (["0", "1", "NA"], "data.train has 'NA' in 1 rows, and numbers in all others"),
        (["0.5", "1.5", "nan", "nan"], "data.train has 'nan' in 2 rows"),
        (["1", "-", "0"], "data.train has '-' in 1 rows"),
    ],
)
def test_texts_that_are_numbers_are_no_names(tmp_path, labels, message):
    path = write(tmp_path, "a", labels)
    with pytest.raises(AdapeftError, match=f"data.label = 'label': .*{message}"):
        numbered(path, path)
    declared = sorted(set(labels))
    named = write(tmp_path, "b", [declared.index(label) for label in labels], declared)
    assert numbered(named, named)[0].label_names == tuple(declared), "a declared name may be anything"
    head = Head(len(declared), tuple(declared))
    assert numbered(path, path, head)[0].label_names == tuple(declared), "and so may one of a trained head"


@pytest.mark.parametrize(
    "labels",
    [["007", "1"], ["+1", "-1"], ["1", "x"], ["0.5", "other"], ["none", "some"], ["1.2.3", "1.10.0"], ["-", "."]],
    ids=str,
)
def test_texts_that_may_be_names(tmp_path, labels):
    path = write(tmp_path, "a", labels)
    assert numbered(path, path)[0].label_names == tuple(sorted(labels))


@pytest.mark.parametrize(
    ("train", "evaluation", "head", "expected"),
    [
        (([0, 1, 1], ["neg", "pos"]), ([0, 1, 0], ["pos", "neg"]), None, ([0, 1, 1], [1, 0, 1])),
        (([0, 1, 1], ["neg", "pos"]), (["pos", "neg"], None), None, ([0, 1, 1], [1, 0])),
        ((["neg", "pos"], None), ([0, 1], ["pos", "neg"]), None, ([0, 1], [1, 0])),
        (([0, 1], ["neg", "pos"]), ([0, 1], ["pos", "neg"]), Head(2, ("pos", "neg")), ([1, 0], [0, 1])),
        (([0, 1], ["neg", "pos"]), ([0, 1], ["pos", "neg"]), Head(2, None), ([0, 1], [1, 0])),
        (([0, 2], ["a", "b", "c"]), ([1], ["b", "c"]), None, ([0, 2], [2])),
    ],
)
def test_every_split_is_read_by_its_own_names(tmp_path, train, evaluation, head, expected):
    paths = [write(tmp_path, name, *split) for name, split in (("train", train), ("evaluation", evaluation))]
    assert numbered(*paths, head)[1:] == expected


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        (([0, 1], ["neg", "pos"]), ([0, 1], None), "its type is named classes in data.train and integer in data.eval"),
        (([0, 1], None), ([0, 1], ["neg", "pos"]), "its type is integer in data.train and named classes in data.eval"),
        (([0, 1], ["neg", "pos"]), ([1], ["neg", "neutral"]), "data.evaluation has labels .* does not: 'neutral'"),
        (([0, 5], None), ([0, 7], None), r"data.evaluation has labels that data.train does not: 7 \(1 of 2 rows\)"),
        ((["pos", " pos", "neg"], None), (["pos"], None), "' pos' and 'pos', which differ only by spaces"),
        ((["pos ", " pos", "neg"], None), (["neg"], None), "' pos' and 'pos ', which differ only by spaces"),
    ],
)
def test_splits_that_cannot_be_matched_are_refused(tmp_path, train, evaluation, message):
    paths = [write(tmp_path, name, *split) for name, split in (("train", train), ("evaluation", evaluation))]
    with pytest.raises(AdapeftError, match=message):
        numbered(*paths)


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([0, 2, 1], None, [0, 2, 1]),
        ([5, 12_345_678], ("5", "12345678"), [0, 1]),
        ([3_000_000_000, 10, 9], ("9", "10", "3000000000"), [2, 1, 0]),
        ([1, 2], ("1", "2"), [0, 1]),
        (["10", "9"], ("10", "9"), [0, 1]),
    ],
)
def test_the_classes_are_the_distinct_labels(tmp_path, labels, names, numbers):
    description, train, _ = numbered(*[write(tmp_path, "a", labels)] * 2)
    assert (description.label_names, description.num_labels, train) == (names, len(labels), numbers)


@pytest.mark.parametrize("kind", [int, str])
def test_ids_are_no_classes(tmp_path, kind):
    few = [kind(1000 + n) for n in range(MOST_CLASSES_OF_FEW)]
    assert numbered(*[write(tmp_path, "few", few)] * 2)[0].num_labels == MOST_CLASSES_OF_FEW
    more = [kind(1000 + n) for n in range(MOST_CLASSES_OF_FEW + 1)]
    assert numbered(*[write(tmp_path, "twice", more * 2)] * 2)[0].num_labels == len(more)
    with pytest.raises(AdapeftError, match=r"51 distinct labels in the 51 rows of data.train .* are ids or texts"):
        numbered(*[write(tmp_path, "once", more)] * 2)


def save_classifier(folder: Path, **labels) -> Model:
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**BERT, **labels)).save_pretrained(folder)
    save_tokenizer(folder, pad_token="t0")
    return Model(name=str(folder), task=TASK)


def test_names_of_a_head_are_those_of_its_config(tmp_path):
    named = save_classifier(
        tmp_path / "named", id2label={0: "positive", 1: "negative"}, label2id={"positive": 0, "negative": 1}
    )
    assert trained_head(named) == SENTIMENT
    assert trained_head(save_classifier(tmp_path / "generic", num_labels=2)) == Head(2, None)
    assert trained_head(Model(name=named.name, task="causal-lm")) is None
    BertModel(BertConfig(**BERT, id2label={0: "a", 1: "b"})).save_pretrained(tmp_path / "base")
    assert trained_head(Model(name=str(tmp_path / "base"), task=TASK)) is None, "there the head is new"


def test_the_names_of_a_trained_head_stay_in_the_config_of_the_run(tmp_path):
    model = save_classifier(tmp_path / "base", id2label={0: "positive", 1: "negative"})
    for labels in (["negative", "positive"], [0, 1]):
        description, *_ = numbered(*[write(tmp_path, "a", labels)] * 2, trained_head(model))
        config = load_model_config(model, description, load_tokenizer(model))
        assert config.id2label == {0: "positive", 1: "negative"}


def trained_delta(folder: Path, names: tuple[str, ...]) -> tuple[Delta, Path]:
    """Return a delta with a new head on a base without one, and the folder of the base."""
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(folder)
    options = label_options(TASK, DataDescription(9, 9, names, "single_label_classification", len(names)))
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    bias = "bert.encoder.layer.0.output.dense.bias"
    attach(model, Subset({bias: Whole((12,))}, HEAD, HEAD))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    delta = extract_delta(model, {"model": {"name": str(folder), "task": TASK, "labels": options}})
    detach(model)
    return delta, folder


def test_the_names_travel_with_the_head_of_a_delta(tmp_path):
    delta, base = trained_delta(tmp_path / "base", ("maybe", "no", "yes"))
    delta.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert loaded.head == Head(3, ("maybe", "no", "yes"), "the delta")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    applied = loaded.apply(model)
    assert model.config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    assert model.config.label2id == {"maybe": 0, "no": 1, "yes": 2}
    applied.revert()
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_data_is_numbered_by_the_head_of_a_delta(tmp_path):
    delta, _ = trained_delta(tmp_path / "base", ("maybe", "no", "yes"))
    path = write(tmp_path, "a", ["yes", "no"])
    assert numbered(path, path)[1] == [1, 0], "as a new head would have it"
    assert numbered(path, path, delta.head)[1] == [2, 1]
    with pytest.raises(AdapeftError, match="but the head of the delta has 'maybe', 'no', 'yes'"):
        numbered(*[write(tmp_path, "b", ["yes", "never"])] * 2, delta.head)
