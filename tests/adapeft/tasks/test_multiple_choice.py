"""Tests of multiple choice: questions with each of their choices, what is refused, the loss, and the model's trial."""

from __future__ import annotations

import datasets
import pytest
import torch
from transformers import BertConfig, BertForMultipleChoice, RobertaConfig, RobertaForMultipleChoice

import adapeft
from adapeft.data.description import DataDescription
from adapeft.errors import AdapeftError
from adapeft.memory.activations import repeated_token
from adapeft.model.load import build_structure, task_of
from adapeft.model.trial import Trial
from adapeft.model.unloaded.weightless import Weightless
from adapeft.tasks.describe import describe
from adapeft.tasks.losses.own_loss import check_own_loss, check_padding
from adapeft.tasks.metrics.metrics import Scorer
from adapeft.tasks.registry import TASKS
from tests.adapeft.model.test_trial import BERT, WORDS, tokenizer_of
from tests.oracles.measuring import check_curvature_of_classes, in_double
from tests.support.checkpoints import write_lines

TASK = TASKS["multiple-choice"]
P = 16
ROWS = [
    {"question": "w1 w2", "choices": ["w3", "w4 w5", "w6"], "label": 1},
    {"question": "w7", "choices": ["w8", "w9", "w10"], "label": 0},
    {"question": "w1 w2 w3", "choices": ["w3 w4 w5", "w6", "w7"], "label": 2},
]
DESCRIPTION = DataDescription(3, 3, None, None, 3)
MODELS = {
    "bert": (BertForMultipleChoice, BertConfig(**BERT, max_position_embeddings=P)),
    "roberta": (RobertaForMultipleChoice, RobertaConfig(**BERT, max_position_embeddings=P + 2, type_vocab_size=1)),
}


def tokenized(rows=ROWS, tokenizer=None, **options):
    data = TASK.data(train="a.jsonl", evaluation="a.jsonl", **options)
    return TASK.tokenize(datasets.Dataset.from_list(rows), data, tokenizer or tokenizer_of(), DESCRIPTION)


def make(name):
    cls, config = MODELS[name]
    torch.manual_seed(0)
    return cls(config).eval()


def ids(*numbers: int) -> list[int]:
    """Return the ids of words between those of the start and the end; four special tokens come first."""
    return [0, *(number + 4 for number in numbers), 2]


def test_every_choice_follows_its_question():
    batch = tokenized().collate([0, 1])
    assert batch.inputs["input_ids"].tolist() == [
        [[*ids(1, 2, 3), 1], ids(1, 2, 4, 5), [*ids(1, 2, 6), 1]],
        [[*ids(7, 8), 1, 1], [*ids(7, 9), 1, 1], [*ids(7, 10), 1, 1]],
    ]
    assert batch.inputs["attention_mask"].sum(-1).tolist() == [[5, 6, 5], [4, 4, 4]]
    assert batch.labels.tolist() == [1, 0]
    assert tokenized().lengths == [6, 4, 8]
    cut = tokenized(max_length=5)
    assert cut.num_truncated == 2
    assert cut.collate([0, 2]).inputs["input_ids"].shape == (2, 3, 5)


def test_choices_may_be_columns_and_labels_letters(tmp_path):
    rows = [
        {"question": row["question"], **dict(zip("abc", row["choices"], strict=True)), "label": "ABC"[row["label"]]}
        for row in ROWS
    ]
    path = str(write_lines(tmp_path / "rows.jsonl", rows))
    data = TASK.data(train=path, evaluation=path, choices=["a", "b", "c"])
    description = describe(TASK, data)
    assert description.num_labels == 3
    found = TASK.tokenize(datasets.Dataset.from_list(rows), data, tokenizer_of(), description).collate([0, 1, 2])
    expected = tokenized().collate([0, 1, 2])
    assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label": 3},
            r"data\.label = 'label': row 3 of data\.train .* has 3, not one of its 3 choices: .* from 0 to 2",
        ),
        ({"label": -1}, "has -1, not one of its 3 choices"),
        ({"label": None}, "has None, not one of its 3 choices"),
        ({"choices": ["w1", "w2"]}, r"data\.choices = 'choices': row 3 .* not 3 choices as in row 0"),
        ({"choices": ["w1"]}, "not a list of at least two texts"),
        ({"choices": ["w1", None, "w2"]}, "not a list of at least two texts"),
        ({"question": None}, r"data\.question = 'question': row 3 .* not a text"),
    ],
)
def test_invalid_rows_are_refused(tmp_path, change, message):
    path = str(write_lines(tmp_path / "rows.jsonl", [*ROWS, {**ROWS[0], **change}]))
    with pytest.raises(AdapeftError, match=message):
        describe(TASK, TASK.data(train=path, evaluation=path))


@pytest.mark.parametrize("label", ["D", "a", "AB", "1", ""])
def test_letters_that_are_no_choice_are_refused(tmp_path, label):
    rows = [{**row, "label": "ABC"[row["label"]]} for row in ROWS]
    path = str(write_lines(tmp_path / "rows.jsonl", [*rows, {**ROWS[0], "label": label}]))
    with pytest.raises(AdapeftError, match="or a letter from A to C"):
        describe(TASK, TASK.data(train=path, evaluation=path))


def test_splits_with_different_numbers_of_choices_are_refused(tmp_path):
    few = [{**row, "choices": row["choices"][:2], "label": 0} for row in ROWS]
    paths = [str(write_lines(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("train", ROWS), ("few", few))]
    with pytest.raises(AdapeftError, match=r"data\.train have 3 choices, those of data\.evaluation 2"):
        describe(TASK, TASK.data(train=paths[0], evaluation=paths[1]))


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_model_and_padding_changes_nothing(name):
    model, data, objective = make(name), tokenized(), TASK.objective(DESCRIPTION)
    check_own_loss(objective, data.collate([0, 1, 2]), model)
    alone, batched = data.collate([1]), data.collate([1, 2])
    check_padding(objective, alone, batched, model)
    batched.inputs["attention_mask"].fill_(1)
    with pytest.raises(AdapeftError, match="of 4 tokens when it is padded to 8"):
        check_padding(objective, alone, batched, model)
    assert task_of(model) == "multiple-choice"


@pytest.mark.parametrize("name", MODELS)
def test_a_trial_runs_every_choice_by_itself(name):
    weightless = Weightless()
    with weightless:
        model = build_structure(MODELS[name][1], "multiple-choice")

    def tried(data, max_length):
        Trial(model, weightless, data).check(max_length, lambda: ("data.train", 40))

    tried(tokenized(), P)
    with pytest.raises(AdapeftError, match=f"the model has {P} positions"):
        tried(tokenized(max_length=P + 1), P + 1)
    unknown = [{**ROWS[0], "choices": ["w1", "w2", "w1 w2 new"]}]
    with pytest.raises(AdapeftError, match="maps 'new' to id 40, but the model has 40 embeddings"):
        tried(tokenized(unknown, tokenizer_of([*WORDS, "new"])), P)


def test_memory_is_counted_for_all_choices():
    batch = repeated_token(MODELS["bert"][1], TASK.objective(DESCRIPTION), 2, 7)
    assert batch.inputs["input_ids"].shape == (2, 3, 7)
    assert make("bert")(**batch.inputs, labels=batch.labels).logits.shape == (2, 3)


def test_sampled_choices_have_the_exact_gauss_newton_form_as_mean():
    """The mean over draws of n (g̃·d)² is dᵀJᵀHJd, with H of the softmax over choices, of a whole model in float64."""
    model = in_double(make("bert"))
    model.set_attn_implementation("eager")  # the fused kernel has no forward derivative
    batch, objective = tokenized().collate([0, 1, 2]), TASK.objective(DESCRIPTION)
    check_curvature_of_classes(model, objective, batch, reaches_all=False)


def test_accuracy_is_the_share_of_right_choices():
    metrics = TASK.metrics(DESCRIPTION)
    scorers = [Scorer(metrics), Scorer(metrics)]
    logits = torch.eye(3)
    scorers[0].update(logits[:1], torch.tensor([0]), 1.0, torch.ones(1, dtype=torch.bool))
    scorers[1].update(logits[1:], torch.tensor([1, 0]), 1.0, torch.ones(2, dtype=torch.bool))
    scorers[0].merge(scorers[1:])
    assert scorers[0].compute() == {"loss": pytest.approx(2 / 3), "accuracy": pytest.approx(2 / 3)}


def test_select_takes_batches_of_choices():
    batches = [{**tokenized().collate(order).inputs, "labels": torch.tensor([0, 2])} for order in ([0, 1], [2, 1])]
    for method in ("adapeft", "fish"):
        subset = adapeft.select(make("bert"), batches, budget=100, method=method, warmup_steps=0)
        assert 0 < subset.count <= 100
