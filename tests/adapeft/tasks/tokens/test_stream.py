"""Streamed examples: those of the whole file, in a seeded order, resumable, and never all in memory."""

from __future__ import annotations

import itertools

import datasets
import numpy as np
import pytest
import torch

from adapeft.data.batches import epoch_batches
from adapeft.data.streams import RowStream, open_rows
from adapeft.errors import AdapeftError
from adapeft.tasks.registry import TASKS
from adapeft.tasks.tokens import tokenize
from adapeft.tasks.tokens.stream import ExampleStream
from tests.adapeft.model.test_trial import tokenizer_of
from tests.adapeft.tasks.test_masked_lm import make_tokenizer as masking_tokenizer
from tests.support.chats import make_tokenizer
from tests.support.checkpoints import write_lines

LETTERS = "abcdefghij"
TEXTS = [" ".join(LETTERS[: 1 + number % 9]) for number in range(230)]
PAIRS = [{"source": f"w{n % 30}" + " w3" * (n % 5), "target": "w1" * (n % 7 > 0)} for n in range(230)]
CHATS = [{"prompt": "a" * (n % 5 + 1), "completion": "b" * (n % 4)} for n in range(230)]
CASES = {
    "causal-lm": ([{"text": text} for text in TEXTS], masking_tokenizer, {"max_length": 8}),
    "masked-lm": ([{"text": text} for text in TEXTS], masking_tokenizer, {"max_length": 8}),
    "seq2seq": (PAIRS, tokenizer_of, {"max_length": 5}),
    "instruct": (CHATS, make_tokenizer, {"max_length": 8, "invalid": "drop"}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tokenize, "_BATCH", 32)  # the rows take several batches of the tokenizer


def tokenized(task, path, *, streaming=True, **options):
    _, make, own = CASES[task]
    data = TASKS[task].data(train=str(path), evaluation=str(path), streaming=streaming, **{**own, **options})
    return TASKS[task].tokenize(open_rows(data, "data.train"), data, make())


@pytest.fixture
def stream(tmp_path):
    """Return a function that opens the texts as a stream."""
    path = write_lines(tmp_path / "train.jsonl", CASES["causal-lm"][0])
    return lambda buffer=1, seed=0: ExampleStream(tokenized("causal-lm", path), buffer, seed)


def numbers_of(batches):
    return [batch.examples.numbers.tolist() for batch in batches]


@pytest.mark.parametrize("task", CASES)
def test_streamed_batches_are_those_of_the_whole_file(task, tmp_path):
    path = write_lines(tmp_path / "train.jsonl", CASES[task][0])
    whole = tokenized(task, path, streaming=False)
    batches = ExampleStream(tokenized(task, path), 1, 0).batches(7)
    per_pass = -(-len(whole) // 7)
    for index, batch in enumerate(itertools.islice(batches, per_pass + 2)):
        epoch, place = divmod(index, per_pass)
        ids = np.arange(len(whole))[7 * place : 7 * place + 7]
        expected, found = whole.collate(ids, epoch), batch.examples.collate(range(len(ids)), epoch)
        assert batch.epoch == epoch
        assert found.inputs.keys() == expected.inputs.keys()
        assert all(torch.equal(found.inputs[name], value) for name, value in expected.inputs.items())
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.ids, expected.ids)
        if index == per_pass - 1:
            counts = batch.counts
    assert (counts.passes, counts.rows, counts.made, counts.examples) == (1, 230, len(whole), len(whole))
    assert counts.truncated == whole.num_truncated
    assert batch.counts.passes == 2
    assert batch.counts.examples == len(whole) + 14


def test_packed_batches_are_those_of_the_whole_file(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", CASES["instruct"][0])
    whole = tokenized("instruct", path, streaming=False, packing=True, max_length=20)
    batch = next(ExampleStream(tokenized("instruct", path, packing=True, max_length=20), 1, 0).batches(7))
    expected, found = whole.collate(range(7)), batch.examples.collate(range(7))
    assert found.inputs["input_ids"].shape[0] < 7
    assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
    assert torch.equal(found.labels, expected.labels)


def test_lines_of_a_text_file_are_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS[:50]))
    whole = tokenized("causal-lm", tmp_path / "a.txt", streaming=False)
    first = ExampleStream(tokenized("causal-lm", tmp_path / "a.txt"), 1, 0).first(1000)
    assert first.rows["input_ids"][:] == whole.rows["input_ids"][:]


def test_the_order_is_that_of_the_seed_and_the_pass(stream):
    def passes(seed, size=9):
        batches = itertools.takewhile(lambda batch: batch.epoch < 2, stream(50, seed).batches(size))
        found = {0: [], 1: []}
        for batch in batches:
            found[batch.epoch] += batch.examples.numbers.tolist()
        return found[0], found[1]

    first, second = passes(0)
    assert sorted(first) == sorted(second) == list(range(len(first)))
    assert first != second
    assert passes(0) == passes(0, size=4) == (first, second), "batches are cut from one order"
    assert passes(1)[0] != first != sorted(first)
    # An example waits for as many others as the buffer holds, and comes no earlier than it is read.
    assert all(number < place + 50 for place, number in enumerate(first))


def test_a_buffer_for_all_examples_gives_the_order_without_streaming(stream):
    batches = stream(1000, seed=3).batches(16)
    first = next(batches)
    found = [first, *itertools.takewhile(lambda batch: batch.epoch < 2, batches)]
    num_examples = max(max(batch.examples.numbers) for batch in found) + 1
    expected = [batch.tolist() for epoch in (0, 1) for batch in epoch_batches(num_examples, 16, 3, epoch)]
    assert numbers_of(found) == expected


def test_what_is_measured_is_what_is_trained_first(stream):
    first = stream(50).first(20)
    batches = list(itertools.islice(stream(50).batches(10), 2))
    assert first.numbers.tolist() == [*itertools.chain(*numbers_of(batches))]
    assert torch.equal(first.collate(range(10, 20)).labels, batches[1].examples.collate(range(10)).labels)
    assert first.collate([3]).ids.tolist() == [first.numbers[3]]


@pytest.mark.parametrize("done", [0, 1, 5, 20])
def test_it_resumes_at_any_batch(stream, done):
    whole = list(itertools.islice(stream(50).batches(16), 24))
    rest = list(itertools.islice(stream(50).batches(16, done), 24 - done))
    assert numbers_of(rest) == numbers_of(whole[done:])
    assert [batch.counts for batch in rest] == [batch.counts for batch in whole[done:]]
    assert {batch.epoch for batch in whole} == {0, 1, 2}


def test_no_more_is_read_than_the_buffer_needs():
    """A source without end: what has been read and not yet trained on is the buffer, and a few batches of rows."""
    read = 0

    def endless():
        nonlocal read
        for number in itertools.count():
            read = number + 1
            yield {"text": TEXTS[8]}  # nine tokens and the end of the text: more than one block

    rows = RowStream("data.train", "endless", ["text"], None, "", {"text": "text"}, endless, "")
    data = TASKS["causal-lm"].data(train="a.jsonl", evaluation="a.jsonl", streaming=True, max_length=10)
    held = ExampleStream(TASKS["causal-lm"].tokenize(rows, data, masking_tokenizer()), 64, 0)
    for batch in itertools.islice(held.batches(8), 500):
        assert read * 9 // 10 - batch.counts.examples <= 64 + 3 * 32
        assert len(batch.examples) == 8
    assert read > 4000


def test_rows_that_are_all_dropped_end_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "_HOPELESS", 200)
    path = write_lines(tmp_path / "train.jsonl", [{"prompt": "a", "completion": " "}] * 300)
    with pytest.raises(AdapeftError, match=r"data.train: its first 224 rows are all dropped, by the rules of"):
        ExampleStream(tokenized("instruct", path), 10, 0).first(1)
    with pytest.raises(AdapeftError, match=r"data.train: row 0 \(counted from 0\): its completion is empty"):
        ExampleStream(tokenized("instruct", path, invalid="error"), 10, 0).first(1)
    short = write_lines(tmp_path / "short.jsonl", [{"text": "a"}])
    with pytest.raises(AdapeftError, match=r"data.train: data.max_length = 8: the texts have only"):
        ExampleStream(tokenized("causal-lm", short), 10, 0).first(1)
