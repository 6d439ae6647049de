"""Tests of token classification: which token has a word's tag, what is refused, and the scores of entities."""

from __future__ import annotations

import datasets
import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import BILOU, IOB2, IOBES, IOE2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapeft.data.description import DataDescription
from adapeft.data.labels import Head
from adapeft.data.sources import rows_of
from adapeft.errors import AdapeftError
from adapeft.tasks.describe import describe
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.metrics.metrics import Scorer
from adapeft.tasks.registry import TASKS
from adapeft.tasks.token_classification import TagMetrics
from tests.support.checkpoints import write_lines

TASK = TASKS["token-classification"]
NAMES = ("B-LOC", "I-LOC", "I-PER", "O")
ROWS = [
    {"tokens": ["Anna", "in", "Bern"], "ner_tags": ["I-PER", "O", "B-LOC"]},
    {"tokens": ["so"], "ner_tags": ["O"]},
    {"tokens": ["New", "York"], "ner_tags": ["B-LOC", "I-LOC"]},
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single letters, so that a word of n letters has n tokens."""
    vocabulary = {token: number for number, token in enumerate(["[PAD]", *"ABNYabefiknorstwy"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def data_of(tmp_path, rows, **options):
    path = str(write_lines(tmp_path / "rows.jsonl", rows))
    return TASK.data(train=path, evaluation=path, **options)


def tokenized(tmp_path, rows, **options):
    data = data_of(tmp_path, rows, **options)
    return TASK.tokenize(rows_of(data, "data.train"), data, make_tokenizer(), describe(TASK, data))


def test_the_first_token_of_a_word_has_its_tag(tmp_path):
    found = tokenized(tmp_path, ROWS)
    batch = found.collate([0, 1, 2])
    gap = [IGNORED] * 3
    expected = [[2, *gap, 3, IGNORED, 0, *gap], [3, *[IGNORED] * 9], [0, IGNORED, IGNORED, 1, *gap, *gap]]
    assert batch.labels.tolist() == expected
    assert batch.inputs["attention_mask"].sum(1).tolist() == [10, 2, 7]
    assert found.num_truncated == 0


def test_words_beyond_the_maximum_are_left_out_and_counted(tmp_path):
    found = tokenized(tmp_path, ROWS, max_length=4)
    assert found.collate([0, 1, 2]).labels.tolist() == [
        [2, *[IGNORED] * 3],
        [3, *[IGNORED] * 3],
        [0, IGNORED, IGNORED, 1],
    ]
    assert found.num_truncated == 1


def test_names_follow_a_trained_head(tmp_path):
    data = data_of(tmp_path, ROWS)
    assert describe(TASK, data).label_names == NAMES
    head = Head(4, ("O", "I-PER", "B-LOC", "I-LOC"))
    description = describe(TASK, data, head)
    assert description.label_names == head.names
    labels = TASK.tokenize(datasets.Dataset.from_list(ROWS), data, make_tokenizer(), description).collate([0]).labels
    assert labels[labels != IGNORED].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"tokens": ["a", "b"], "ner_tags": ["O"]}],
            r"data\.train: row 0 .*: data\.label = 'ner_tags' has 1 tags for 2 words\. .*data\.invalid: drop",
        ),
        (
            [*ROWS, {"tokens": [], "ner_tags": []}],
            r"data\.train: row 3 .*: data\.words = 'tokens' has \[\], not a list of words",
        ),
        (
            [*ROWS, {"tokens": ["a"], "ner_tags": [None]}],
            r"row 3 .*: data\.label = 'ner_tags' has \[None\], not a list of names",
        ),
        (
            [{"tokens": "a b", "ner_tags": ["O", "O"]}],
            r"row 0 .*: data\.words = 'tokens' has 'a b', not a list of words",
        ),
        ([{"words": ["a"], "ner_tags": ["O"]}], r"data\.words = 'tokens': data\.train has no such column"),
        ([{"tokens": ["a"], "ner_tags": [0.5]}], "floats"),
    ],
)
def test_invalid_rows_are_refused(tmp_path, rows, message):
    with pytest.raises(AdapeftError, match=message):
        describe(TASK, data_of(tmp_path, rows))


BAD = {
    "too-few-tags": {"tokens": ["a", "b"], "ner_tags": ["O"]},
    "no-words": {"tokens": [], "ner_tags": []},
    "no-list": {"tokens": "a b", "ner_tags": ["O", "O"]},
    "no-tag": {"tokens": ["a"], "ner_tags": [None]},
    "missing": {"tokens": None, "ner_tags": None},
    "no-token": {"tokens": [" "], "ner_tags": ["O"]},
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_invalid_rows_are_dropped_if_the_config_says_so(tmp_path, row):
    found = tokenized(tmp_path, [ROWS[0], row, *ROWS[1:]], invalid="drop")
    expected = tokenized(tmp_path, ROWS)
    assert len(found) == 3
    assert found.collate([0, 1, 2]).labels.tolist() == expected.collate([0, 1, 2]).labels.tolist()
    with pytest.raises(AdapeftError, match=r"row 1 \(counted from 0\): .*or set data\.invalid: drop"):
        tokenized(tmp_path, [ROWS[0], row, *ROWS[1:]])


def test_rows_that_are_all_invalid(tmp_path):
    with pytest.raises(AdapeftError, match=r"data\.train: all 2 rows are dropped; the first is row 0: .* 1 tags for 2"):
        tokenized(tmp_path, [BAD["too-few-tags"], BAD["no-words"]], invalid="drop")


@pytest.mark.parametrize("declared", [False, True], ids=["names", "class-label"])
def test_tags_that_are_unknown_to_the_training_data(tmp_path, declared):
    def write(name, rows, names):
        data = datasets.Dataset.from_list(rows)
        if declared:
            data = data.cast_column("ner_tags", datasets.List(datasets.ClassLabel(names=names)))
        data.to_parquet(tmp_path / name)
        return data, str(tmp_path / name)

    rows = [ROWS[0], {"tokens": ["by"], "ner_tags": ["B-ORG"]}, ROWS[2]]
    _, train = write("train.parquet", ROWS, list(NAMES))
    evaluation, path = write("evaluation.parquet", rows, ["B-ORG", *NAMES])
    with pytest.raises(
        AdapeftError, match=r"data\.evaluation: row 1 .* has the tag 'B-ORG', which no row of data\.train"
    ):
        describe(TASK, TASK.data(train=train, evaluation=path))
    data = TASK.data(train=train, evaluation=path, invalid="drop")
    description = describe(TASK, data)
    assert description.label_names == NAMES
    found = TASK.tokenize(evaluation, data, make_tokenizer(), description)
    assert [[tag for tag in row if tag != IGNORED] for row in found.rows["labels"]] == [[2, 3, 0], [0, 1]]


def scored(names, expected, found):
    """Return the metrics of tags by example, of which the batches pad the shorter ones."""
    length = max(map(len, expected))
    labels = torch.tensor([[*one, *[IGNORED] * (length - len(one))] for one in expected])
    tags = torch.tensor([[*one, *[0] * (length - len(one))] for one in found])
    metrics = TagMetrics(names, len(names))
    scorers = [Scorer(metrics), Scorer(metrics)]
    for scorer, row in zip(scorers, (slice(0, 1), slice(1, None)), strict=True):
        logits = torch.nn.functional.one_hot(tags[row], len(names)).float()
        scorer.update(logits, labels[row], 1.0, labels[row] != IGNORED)
    scorers[0].merge(scorers[1:])
    return scorers[0].compute()


def test_entities_count_with_type_and_both_ends():
    """Of three entities one is right, one ends early and one is missed; a name split in two counts as two."""
    numbers = {name: number for number, name in enumerate(NAMES)}
    expected = [["I-PER", "O", "B-LOC", "I-LOC"], ["I-PER", "I-PER"], ["O"]]
    found = [["I-PER", "O", "B-LOC", "O"], ["O", "O"], ["O"]]
    scores = scored(NAMES, *([[numbers[tag] for tag in one] for one in given] for given in (expected, found)))
    assert scores["entity_precision"] == pytest.approx(1 / 2)
    assert scores["entity_recall"] == pytest.approx(1 / 3)
    assert scores["entity_f1"] == pytest.approx(2 / 5)
    assert scores["accuracy"] == pytest.approx(4 / 7)


@pytest.mark.parametrize(
    ("scheme", "forms"),
    [(IOB2, "BIIB"), (IOE2, "IIEE"), (IOBES, "BIES"), (BILOU, "BILU"), (IOBES, "BMES")],
)
def test_every_scheme_of_entities_has_the_strict_scores_of_seqeval(scheme, forms):
    """Where predictions are valid in the scheme. BMES is IOBES with another letter, which seqeval does not know.

    Args:
        forms: prefixes of the first, an inner and the last word of an entity, and of a single one.
    """
    first, inner, last, single = forms
    names = sorted({"O", *(f"{form}-{kind}" for form in forms for kind in ("LOC", "PER"))})
    expected = [
        [f"{first}-PER", f"{inner}-PER", f"{last}-PER", f"{single}-LOC", f"{single}-LOC", "O"],
        [f"{first}-LOC", f"{last}-LOC"],
    ]
    found = [
        [f"{first}-PER", f"{last}-PER", "O", f"{single}-LOC", "O", f"{single}-PER"],
        [f"{first}-LOC", f"{last}-LOC"],
    ]
    scores = scored(names, *([[names.index(tag) for tag in one] for one in given] for given in (expected, found)))
    expected, found = ([[tag.replace("M-", "I-") for tag in one] for one in given] for given in (expected, found))
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert scores[f"entity_{name}"] == pytest.approx(score(expected, found, mode="strict", scheme=scheme))
        assert scores[f"entity_{name}"] == pytest.approx(1 / 2)


def test_an_entity_does_not_continue_in_the_next_example():
    numbers = {name: number for number, name in enumerate(NAMES)}
    tags = [[numbers["I-PER"]], [numbers["I-PER"]]]
    other = [[numbers["I-PER"]], [numbers["O"]]]
    assert scored(NAMES, tags, other)["entity_recall"] == pytest.approx(1 / 2)


def test_other_tags_have_an_accuracy_alone():
    description = DataDescription(1, 1, ("NOUN", "VERB"), None, 2)
    assert TASK.metrics(description).primary("auto") == ("accuracy", True)
    assert scored(("NOUN", "VERB"), [[0, 1], [1]], [[0, 0], [1]]).keys() == {"loss", "accuracy"}
    with pytest.raises(AdapeftError, match="entity_f1"):
        TASK.metrics(description).primary("entity_f1")
