"""Files as tables: every row is read, and texts stay as they are in the file, whatever they look like."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adapeft.data.sources import load_rows, num_lines
from adapeft.errors import AdapeftError
from adapeft.tasks.describe import describe
from adapeft.tasks.registry import TASKS
from adapeft.tasks.sequence_classification import ClassificationData

LOOKS_LIKE_MORE = ["007", "1e5", "42", "3.50", "True", "NA", "null", "2024-01-01", "9" * 40, "NaN", " a ", "-0", "+1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(path: str) -> datasets.Dataset:
    return load_rows(path, "data.train")


def description(train: str, **columns):
    return describe(TASKS["sequence-classification"], ClassificationData(train=train, evaluation=train, **columns))


# --- quoting and lines -----------------------------------------------------------------------------------------------


def test_quotes_of_a_tsv_are_characters(tmp_path):
    texts = ['"so good , he said', "bad film", '"nice one', 'ugly "thing" here', '"all of it"', '""', "it's"]
    path = write(tmp_path, "a.tsv", "text\tlabel\n" + "".join(f"{text}\t{n % 2}\n" for n, text in enumerate(texts)))
    rows = read(path)
    assert rows["text"][:] == texts
    assert rows["label"][:] == [0, 1, 0, 1, 0, 1, 0]
    assert num_lines(path) == len(texts)


def test_quotes_of_a_csv_hold_commas_breaks_and_quotes(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"a, b\nc ""d""",1\nx "y" z,0\n"",1\n')
    assert read(path).to_list() == [
        {"text": 'a, b\nc "d"', "label": 1},
        {"text": 'x "y" z', "label": 0},
        {"text": None, "label": 1},
    ]
    assert num_lines(path) == 4, "one more than rows: a text has a line break"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,label\n"so good,1\nbad,0\n', r"line 3: unexpected end of data. A text that begins"),
        ("a.csv", 'text,label\n"so good" he said,1\nbad,0\n', r"line 2: ',' expected after '\"'"),
        ("a.csv", 'text,label\n"so good, he said,1\nbad,0\nnice "x",0\n', "line 4: ',' expected"),
        ("a.csv", "text,label\na,1\nb, c,0\n", "line 3 has 3 cells, the first line 2. Put texts with commas"),
        ("a.csv", "text,label\na,1\nb\n", "line 3 has 1 cells, the first line 2"),
        ("a.csv", "text,text,label\na,b,1\n", "two columns have the name 'text'; rename one"),
        ("a.tsv", "text\tlabel\na\tb\t1\n", "line 2 has 3 cells, the first line 2. A TSV has no quoting"),
        ("a.tsv", 'text\tlabel\n"he said ""no"""\t1\n"b"\t0\n', "'text' is quoted as in a CSV, with doubled quotes"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "la', "JSON parse error: line 2: Unterminated"),
        ("a.jsonl", '{"text": "a", "text": "b", "label": 1}\n', "the field 'text' occurs twice"),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1]\n', "row 1 .* is .1., not an object"),
        ("a.json", '{"data": [{"text": "a"}, {"text": "b"}]}', r"holds its rows in a field \(data\)"),
        ("a.json", '{"text": ["a", "b"], "label": [1]}', "different lengths .'text' 2, 'label' 1"),
        ("a.csv", b"text,label\ncaf\xe9,1\nb,0\n", "codec can't decode .* well-formed csv in UTF-8"),
    ],
)
def test_what_would_lose_or_change_rows_is_refused_by_line(tmp_path, name, content, message):
    with pytest.raises(AdapeftError, match=rf"data.train = .*{name}: cannot be read: .*{message}"):
        read(write(tmp_path, name, content))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "txt"])
def test_marks_blank_lines_and_line_ends(tmp_path, suffix, mark, line_end, last):
    lines = {
        "csv": ["text,label", "a,1", "", "b,0"],
        "tsv": ["text\tlabel", "a\t1", "", "b\t0"],
        "jsonl": ['{"text": "a", "label": 1}', "", '{"text": "b", "label": 0}'],
        "json": ['{"text": "a", "label": 1}', "", '{"text": "b", "label": 0}'],
        "txt": ["a", "", "b"],
    }[suffix]
    path = write(tmp_path, f"a.{suffix}", mark + line_end.join(lines) + line_end * last)
    rows = read(path)
    if suffix == "txt":
        assert rows["text"][:] == ["a\n", "\n", "b\n" if last else "b"]
    else:
        assert rows.to_list() == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert num_lines(path) == (None if suffix == "json" else len(rows))


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a", "label": 1},\n {"text": "b", "label": 0}]',
        '{"text": ["a", "b"], "label": [1, 0]}',
        '{\n "text": ["a", "b"],\n "label": [1, 0]\n}',
        '{"text": "a", "label": 1}\n{"text": "b", "label": 0}',
    ],
)
def test_forms_of_a_json_file(tmp_path, content):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    assert read(write(tmp_path, "a.json", content)).to_list() == rows


def test_a_field_that_comes_late_is_missing_before(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"label": 1, "text": "b"}\n')
    assert read(path).to_list() == [{"text": "a", "label": None}, {"text": "b", "label": 1}]


def test_lines_are_counted_apart_from_reading(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    shorter = datasets.Dataset.from_list([{"text": "a", "label": 1}])
    monkeypatch.setattr("adapeft.data.sources.read_json", lambda path: shorter)
    with pytest.raises(AdapeftError, match=r"a.jsonl: 1 rows were read from 2 lines"):
        read(path)


def test_rows_and_lines_are_both_described(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"a\nb",1\nc,0\n')
    found = description(path)
    assert (found.num_train, found.lines["data.train"]) == (2, 3)
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "a.parquet")
    assert description(str(tmp_path / "a.parquet")).lines["data.train"] == 2


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("texts", [LOOKS_LIKE_MORE, *([text] * 2 for text in LOOKS_LIKE_MORE)], ids=str)
def test_columns_configured_as_text_are_text(tmp_path, suffix, texts):
    rows = [{"first": text, "second": text, "label": n % 2} for n, text in enumerate(texts)]
    if suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
        path = str(tmp_path / "a.parquet")
    elif suffix in ("csv", "tsv"):
        separator = "," if suffix == "csv" else "\t"
        lines = [rows[0].keys(), *(map(str, row.values()) for row in rows)]
        path = write(tmp_path, f"a.{suffix}", "".join(separator.join(line) + "\n" for line in lines))
    else:
        path = write(tmp_path, f"a.{suffix}", "\n".join(map(json.dumps, rows)))
    description(path, text="first", text_pair="second")
    read_again = load_rows(path, "data.train", ("first", "second"))
    assert read_again["first"][:] == texts == read_again["second"][:]


def test_a_text_column_may_begin_with_ten_thousand_numbers(tmp_path):
    texts = [*map(str, range(70_000)), "hello"]
    path = write(tmp_path, "a.csv", "text,label\n" + "".join(f"{text},{n % 2}\n" for n, text in enumerate(texts)))
    assert read(path)["text"][:] == texts


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["0", "1"], [0, 1]),
        (["01", "1"], ["01", "1"]),
        (["0", "1.5"], [0.0, 1.5]),
        (["1e-3", ".5", "2."], [0.001, 0.5, 2.0]),
        (["1", "x"], ["1", "x"]),
        (["True", "false"], [True, False]),
        (["True", "1"], ["True", "1"]),
        (["1", "9" * 20], ["1", "9" * 20]),
        ([" 1", "1"], [" 1", "1"]),
        (["2024-01-01", "2024-01-02"], ["2024-01-01", "2024-01-02"]),
        (["NA", "null"], ["NA", "null"]),
        (["1", ""], [1, None]),
        (["", ""], [None, None]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_types_of_other_columns_are_decided_by_all_cells(tmp_path, suffix, cells, expected):
    separator = "," if suffix == "csv" else "\t"
    path = write(tmp_path, f"a.{suffix}", f"text{separator}label\n" + "".join(f"a{separator}{c}\n" for c in cells))
    assert read(path)["label"][:] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], [1, 2]),
        ([1, 2.5], [1.0, 2.5]),
        (["2024-01-01", "2025-01-01"], ["2024-01-01", "2025-01-01"]),
        ([True, False], [True, False]),
        ([1, None], [1, None]),
    ],
)
def test_types_of_json_are_those_of_its_values(tmp_path, values, expected):
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps({"text": "a", "label": value}) for value in values))
    assert read(path)["label"][:] == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 0}, {"text": 7, "label": 1}], r"data.text = 'text': row 1 .* has 7, not a text.*1 of"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": True}], r"0 in row 0 and True in row 1"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": "1"}], r"0 in row 0 and '1' in row 1"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 2**70}], r"data.train holds Json"),
    ],
)
def test_mixed_types_are_refused_by_row(tmp_path, rows, message):
    with pytest.raises(AdapeftError, match=message):
        description(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))


def test_an_unused_column_may_hold_anything(tmp_path):
    rows = [{"text": "a", "label": 0, "meta": 1}, {"text": "b", "label": 1, "meta": {"x": [1, "y"]}}]
    assert description(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))).num_labels == 2


def test_a_file_changed_within_the_resolution_of_its_times_is_read_anew(tmp_path):
    import os

    for suffix, contents in (("txt", (b"a\n", b"b\n")), ("jsonl", (b'{"text": "a"}', b'{"text": "b"}'))):
        found = []
        for content in contents:
            path = write(tmp_path, f"a.{suffix}", content)
            os.utime(path, (10**9, 10**9))
            found.append(read(path)["text"][0].strip())
        assert found == ["a", "b"]
