"""Tests of sequence to sequence: sources and targets of different lengths, what is too long, and the model's trial."""

from __future__ import annotations

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config

from adapeft.data.description import DataDescription
from adapeft.errors import AdapeftError
from adapeft.model.load import build_structure, task_of
from adapeft.model.trial import Trial
from adapeft.model.unloaded.weightless import Weightless
from adapeft.tasks.describe import describe
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.losses.own_loss import check_own_loss, check_padding
from adapeft.tasks.registry import TASKS
from tests.adapeft.model.test_trial import BART, IDS, SEQ2SEQ, WORDS, tokenizer_of
from tests.support.checkpoints import write_lines

TASK = TASKS["seq2seq"]
P = 12
CONFIGS = {
    "bart": BartConfig(
        **IDS, **BART, **SEQ2SEQ, d_model=16, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=P
    ),
    "t5": T5Config(**IDS, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2, decoder_start_token_id=1),
}
ROWS = [
    {"source": "w1 w2 w3", "target": "w4"},
    {"source": "w5", "target": "w6 w7 w8 w9 w10"},
    {"source": "w1 w2", "target": "w3 w4"},
]
DESCRIPTION = DataDescription(3, 3, None, None, 0)


def tokenized(rows=ROWS, tokenizer=None, **options):
    data = TASK.data(train="a.jsonl", evaluation="a.jsonl", **options)
    return TASK.tokenize(datasets.Dataset.from_list(rows), data, tokenizer or tokenizer_of(), DESCRIPTION)


def ids(*numbers: int) -> list[int]:
    """Return the ids of words between those of the start and the end; four special tokens come first."""
    return [0, *(number + 4 for number in numbers), 2]


def test_sources_and_targets_are_padded_each_to_their_longest():
    data = tokenized()
    batch = data.collate([0, 1])
    assert batch.inputs["input_ids"].tolist() == [ids(1, 2, 3), [*ids(5), 1, 1]]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 3]
    assert batch.labels.tolist() == [[*ids(4), *[IGNORED] * 4], ids(6, 7, 8, 9, 10)]
    assert data.lengths == [5, 7, 4]
    fixed = tokenized(padding="max_length", max_length=9).collate([0])
    assert fixed.inputs["input_ids"].shape == (1, 9)
    assert fixed.labels.shape == (1, 3)


def test_targets_are_padded_on_the_right_whatever_the_side_of_the_tokenizer():
    batch = tokenized(tokenizer=tokenizer_of(padding_side="left")).collate([0, 1])
    assert batch.inputs["input_ids"].tolist()[1] == [1, 1, *ids(5)]
    assert batch.labels.tolist()[0] == [*ids(4), *[IGNORED] * 4]


def test_the_prefix_is_before_every_source():
    assert tokenized(prefix="w35 ").collate([2]).inputs["input_ids"].tolist() == [ids(35, 1, 2)]


def test_what_is_too_long_follows_the_config():
    limits = {"max_length": 4, "max_target_length": 4}
    kept = tokenized(**limits)
    assert kept.num_truncated == 2
    assert kept.collate([0]).inputs["input_ids"].tolist() == [ids(1, 2)]
    assert kept.collate([1]).labels.tolist() == [ids(6, 7)]
    dropped = tokenized(**limits, too_long="drop")
    assert len(dropped) == 1
    assert dropped.collate([0]).labels.tolist() == [ids(3, 4)]
    with pytest.raises(AdapeftError, match=r"row 0 \(counted from 0\): its source has more than data\.max_length = 4"):
        tokenized(**limits, too_long="error")
    with pytest.raises(AdapeftError, match=r"row 1 .* its target has more than data\.max_target_length = 4 tokens"):
        tokenized(max_target_length=4, too_long="error")
    with pytest.raises(AdapeftError, match="all 3 pairs are dropped; the first is row 0: its source has more than"):
        tokenized(max_length=3, max_target_length=3, too_long="drop", prefix="w1 ")
    with pytest.raises(AdapeftError, match=r"data\.max_target_length = 2: a text has 2 special tokens.*at least 3"):
        tokenized(max_target_length=2)


def test_a_text_without_tokens_follows_the_config():
    """Tokenizers without special tokens, such as GPT-2's, give no token for an empty text."""
    plain = tokenizer_of()
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1")
    rows = [*ROWS, {"source": "w1", "target": " "}]
    with pytest.raises(AdapeftError, match=r"row 3 .* its target has no token\. Correct or drop .*data\.invalid: drop"):
        tokenized(rows, tokenizer=plain)
    assert len(tokenized(rows, tokenizer=plain, invalid="drop")) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"source": "a"}], r"data\.target = 'target': data\.train has no such column"),
        ([*ROWS, {"source": "a", "target": None}], r"data\.target = 'target': row 3 of data\.train .* not a text"),
        ([{"source": 3, "target": "b"}], r"data\.source = 'source': row 0 .* not a text"),
    ],
)
def test_invalid_rows_are_refused(tmp_path, rows, message):
    path = str(write_lines(tmp_path / "rows.jsonl", rows))
    with pytest.raises(AdapeftError, match=message):
        describe(TASK, TASK.data(train=path, evaluation=path))


def trial_of(name, data):
    weightless = Weightless()
    with weightless:
        model = build_structure(CONFIGS[name], "seq2seq")
    return Trial(model, weightless, data)


def tried(name, data, max_length, largest=("data.train", 39)):
    trial_of(name, data).check(max_length, lambda: largest)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_trial_runs_the_decoder_on_the_targets(name):
    """What it refuses crashes the model with weights: targets beyond the positions, and tokens without embedding."""
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS[name])
    limits = {"max_length": P, "max_target_length": P}
    long = tokenized([*ROWS, {"source": "w1", "target": "w2 " * P}], max_length=P)
    unknown = tokenized([{"source": "w1", "target": "new"}], tokenizer_of([*WORDS, "new"]), **limits)
    tried(name, tokenized(**limits), P)
    with pytest.raises(AdapeftError, match="maps 'new' to id 40, but the model has 40 embeddings"):
        tried(name, unknown, P, ("data.train", 40))
    with pytest.raises(IndexError):
        run(model, unknown.collate([0]))
    if name == "t5":
        return tried(name, long, P)
    # Short targets are held against the longest that may come.
    for data in (long, tokenized(max_length=P)):
        with pytest.raises(AdapeftError, match=rf"data\.max_target_length = 128: the decoder has {P} positions"):
            tried(name, data, P)
    with pytest.raises(IndexError):
        run(model, long.collate([3]))
    with pytest.raises(AdapeftError, match=rf"data\.max_length = {P + 1}: the model has {P} positions"):
        tried(name, tokenized(max_length=P + 1, max_target_length=P), P + 1)
    trial = trial_of(name, tokenized(**limits))
    trial.check_answers(3, P)
    with pytest.raises(AdapeftError, match=rf"data\.max_new_tokens = {P + 1}: the decoder has {P} positions"):
        trial.check_answers(3, P + 1)


def run(model, batch):
    return model(**batch.inputs, labels=batch.labels)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_shifts_the_labels_and_padding_changes_nothing(name):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS[name]).eval()
    data, objective = tokenized(), TASK.objective(DESCRIPTION)
    check_own_loss(objective, data.collate([0, 1, 2]), model)
    check_padding(objective, data.collate([2]), data.collate([2, 1, 0]), model)
    # A model whose encoder reads the padding gives other logits.
    alone, batched = data.collate([2]), data.collate([2, 1, 0])
    batched.inputs["attention_mask"].fill_(1)
    with pytest.raises(AdapeftError, match="when it is padded to 5"):
        check_padding(objective, alone, batched, model)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_task_of_the_model_is_known(name):
    assert task_of(AutoModelForSeq2SeqLM.from_config(CONFIGS[name])) == "seq2seq"


def test_prompts_are_what_the_encoder_reads():
    """Numbers are those of the tokenized examples, without the row that was dropped; references are whole."""
    rows = [{"source": "w1 w2 w3 w4", "target": "w5"}, *ROWS]
    data = TASK.data(
        train="a", evaluation="a", prefix="w35 ", max_length=6, max_target_length=8, too_long="drop", generate=2
    )
    found = TASK.prompts(datasets.Dataset.from_list(rows), data, tokenizer_of())
    assert found.texts == ["w35 w1 w2 w3", "w35 w5"]
    assert found.ids == [ids(35, 1, 2, 3), ids(35, 5)]
    assert found.references == ["w4", "w6 w7 w8 w9 w10"]
    assert found.examples == [0, 1]
    assert found.ends == {2}
    cut = data.model_copy(update={"too_long": "truncate", "max_target_length": 4, "generate": "all"})
    found = TASK.prompts(datasets.Dataset.from_list(rows), cut, tokenizer_of())
    assert len(found) == 4
    assert found.ids[0] == ids(35, 1, 2, 3)
    assert found.references[2] == "w6 w7 w8 w9 w10"
    assert (
        TASK.prompts(datasets.Dataset.from_list(rows), cut.model_copy(update={"generate": 0}), tokenizer_of()) is None
    )
