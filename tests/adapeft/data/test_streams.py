"""Streams of rows: the values of whole files, errors with the row, and what tells one source from another."""

from __future__ import annotations

import csv
import json
import shutil
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adapeft.data.sources import load_rows
from adapeft.data.streams import RowStream, open_rows
from adapeft.errors import AdapeftError
from adapeft.tasks.causal_lm import CausalLMData
from adapeft.tasks.describe import describe
from adapeft.tasks.instruct.section import InstructData
from adapeft.tasks.registry import TASKS
from tests.adapeft.data.test_tables import LOOKS_LIKE_MORE
from tests.support.checkpoints import write_lines

DATES = ["2024-01-01", "2024-01-02 10:00:00"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, texts):
    rows = [{"number": str(number), "text": text} for number, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in texts))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["number", "text"], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_lines(path, rows)
    return str(path)


def opened(train, field="data.train", **options) -> RowStream:
    given = {"train": train, "evaluation": train, "streaming": True, **options}
    return open_rows(CausalLMData(**given), field)


def texts_of(stream: RowStream, size: int = 4) -> list[str]:
    return [text for batch in stream.iter(size) for text in batch["text"]]


@pytest.mark.parametrize("texts", [LOOKS_LIKE_MORE, DATES], ids=["mixed", "dates"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_a_stream_has_the_texts_of_the_whole_file(suffix, texts, tmp_path):
    path = write(tmp_path / f"train.{suffix}", texts)
    stream, whole = opened(path), load_rows(path, "data.train")
    assert texts_of(stream) == texts_of(stream, 1000) == whole["text"][:]
    assert stream.column_names == whole.column_names
    assert stream.builder_name == ("text" if suffix == "txt" else stream.builder_name)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_bad_text_is_named_by_its_row(suffix, tmp_path):
    stream = opened(write(tmp_path / f"train.{suffix}", ["fine"] * 1500 + [None] + ["fine"] * 20))
    batches = stream.iter(1000)
    assert len(next(batches)["text"]) == 1000
    with pytest.raises(AdapeftError, match=r"data.text = 'text': row 1500 of data.train \(counted from 0\) has None"):
        next(batches)


def test_what_cannot_be_read_is_named_by_its_place(tmp_path):
    path = write(tmp_path / "train.jsonl", ["fine"] * 1200)
    with open(path, "a") as file:
        file.write("{ text\n")
    with pytest.raises(
        AdapeftError, match=r"after its first 1,000 rows: JSON parse error: line 1201: .*one object per"
    ):
        texts_of(opened(path), 1000)
    (tmp_path / "array.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    with pytest.raises(AdapeftError, match=r"row 0 \(counted from 0\) is \[.*one object per line"):
        opened(str(tmp_path / "array.json"))
    (tmp_path / "header.csv").write_text("text,label\n")
    with pytest.raises(AdapeftError, match="holds no rows"):
        opened(str(tmp_path / "header.csv"))
    (tmp_path / "quoted.tsv").write_text('text\n"so ""good"""\n"bad"\n')
    with pytest.raises(AdapeftError, match="column 'text' is quoted as in a CSV"):
        opened(str(tmp_path / "quoted.tsv"))


def test_a_failing_disk_is_no_bad_row(tmp_path):
    def read():
        yield {"text": "fine"}
        raise OSError("Input/output error")

    stream = RowStream("data.train", "a.jsonl", ["text"], None, "", {"text": "text"}, read, "")
    with pytest.raises(OSError, match="Input/output"):
        texts_of(stream)


def test_a_column_that_only_later_rows_have_is_read(tmp_path):
    asked = {"instruction": "a", "output": "b"}
    path = str(write_lines(tmp_path / "train.jsonl", [asked] * 1500 + [{**asked, "system": "c"}]))
    data = InstructData(train=path, evaluation=path, streaming=True)
    stream = open_rows(data, "data.train")
    columns = TASKS["instruct"].columns(stream, "data.train", data)
    rows = next(stream.select_columns(columns).iter(2000))
    assert rows["system"] == [None] * 1500 + ["c"]


def test_the_description_reads_only_the_evaluation_data_to_the_end(tmp_path):
    train = write(tmp_path / "train.jsonl", ["fine"] * 1500 + [None])
    data = CausalLMData(train=train, evaluation=write(tmp_path / "b.jsonl", ["a", "b"]), streaming=True)
    found = describe(TASKS["causal-lm"], data)
    assert (found.num_train, found.num_evaluation) == (None, 2)
    assert found.lines == {"data.train": None, "data.evaluation": 2}
    assert TASKS["causal-lm"].summary(found, data).startswith("streamed training texts, 2 evaluation texts")
    with pytest.raises(AdapeftError, match=r"data.text = 'words': data.train has no such column"):
        describe(TASKS["causal-lm"], data.model_copy(update={"text": "words"}))


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_evaluation_reads_the_first_rows(suffix, tmp_path):
    path = write(tmp_path / f"a.{suffix}", list("abcdefg"))
    whole = opened(path, "data.evaluation")
    rows = opened(path, "data.evaluation", evaluation_examples=3)
    assert rows["text"][:] == whole["text"][:3]
    assert rows.builder_name == (None if suffix == "jsonl" else whole.builder_name)


def test_content_is_that_of_the_file_and_not_of_its_place(tmp_path):
    path = write(tmp_path / "a.jsonl", ["abc"] * 10)
    copy = tmp_path / "b.jsonl"
    shutil.copy(path, copy)
    assert opened(str(copy)).content == opened(path).content
    copy.write_text(copy.read_text().replace('"5"', '"6"'))
    assert opened(str(copy)).content != opened(path).content


class Builder:
    """Stands in for what ``datasets.load_dataset_builder`` returns for a hub data set."""

    def __init__(self, path, revision="abc"):
        self._path, self.hash = path, "hash"
        files = datasets.data_files.DataFilesList([f"hf://datasets/imdb@{revision}/a.parquet"], [("imdb", revision)])
        self.config = datasets.BuilderConfig(data_files=datasets.data_files.DataFilesDict({"train": files}))

    def as_streaming_dataset(self, split):
        assert split in ("train", "validation")
        return datasets.load_dataset("parquet", data_files=self._path, split="train", streaming=True)


def test_a_hub_data_set_is_told_by_its_revision(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", list("abcdefg"))

    def content(source, revision="abc"):
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: Builder(path, revision))
        stream = opened(source)
        assert texts_of(stream) == list("abcdefg")
        assert opened(source, "data.evaluation", evaluation_examples=2)["text"][:] == ["a", "b"]
        assert opened(source, "data.evaluation")["text"][:] == list("abcdefg")
        return stream.content

    assert content("imdb") == content("imdb@train") != content("imdb", "def")
    monkeypatch.setattr(datasets, "load_dataset_builder", partial(_missing, "imdb"))
    with pytest.raises(AdapeftError, match=r"data.train = imdb: cannot be read.*hub data set, split 'train'"):
        opened("imdb")


def _missing(expected, name, config):
    raise datasets.exceptions.DatasetNotFoundError(f"no {expected}")
