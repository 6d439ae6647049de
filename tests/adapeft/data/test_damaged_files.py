"""Damaged data files are read as rows, or rejected with the config field and the file name."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapeft import AdapeftError
from adapeft.tasks.describe import describe
from adapeft.tasks.registry import TASKS
from adapeft.tasks.sequence_classification import ClassificationData
from tests.support.damage import damaged_bytes, examples

ROWS = [{"text": "the sky", "label": "blue"}, {"text": "a rose", "label": "red"}] * 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parquet(path: Path, table: pa.Table) -> bytes:
    pq.write_table(table, path)
    return path.read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        ".csv": ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)).encode(),
        ".parquet": parquet(folder / "a.parquet", pa.Table.from_pylist(ROWS)),
    }


def read(path: Path) -> None:
    """Describe a file as training data, next to a good one; any error must name the config field."""
    good = path.with_name("good.jsonl")
    good.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = ClassificationData(train=str(path), evaluation=str(good), text="text", label="label")
    said = "data."
    try:
        describe(TASKS["sequence-classification"], data)
    except AdapeftError as error:
        said = str(error)
    assert "data." in said


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_bytes(tmp_path, suffix):
    @examples(12)
    @given(damaged_bytes(contents(tmp_path)[suffix]), st.integers(0, 10**9))
    def run(content: bytes, number: int) -> None:
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(content)
        read(path)

    run()


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"text": "a", "label": ' + "9" * 5000 + "}",
        '{"text": "a", "label": {"a": 1}}',
        '{"text": ["a"], "label": "blue"}',
        '{"text": "\\ud800", "label": "blue"}',
        '{"text": "a", "text": "b", "label": "blue"}',
        "NaN",
        '{"a": {"_type": "Image"}}',
    ],
)
def test_lines(tmp_path, line):
    path = tmp_path / "damaged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + line + "\n")
    read(path)


def test_lines_in_latin_1(tmp_path):
    path = tmp_path / "latin.jsonl"
    rows = [{"text": "café", "label": "blue"}, *ROWS]
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("latin-1"))
    data = ClassificationData(train=str(path), evaluation=str(path))
    with pytest.raises(AdapeftError, match=r"data.train = .*latin.jsonl: cannot be read: .*utf-8.* in UTF-8"):
        describe(TASKS["sequence-classification"], data)


@pytest.mark.parametrize("feature", ["Image", "Audio", "Pdf", "Value", "Sequence", "Nobody"])
def test_features_that_a_file_claims(tmp_path, feature):
    """Some features are decoded by opening the file that a row names."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    described = {"info": {"features": {"text": {"_type": feature}, "label": {"dtype": "string", "_type": "Value"}}}}
    texts = pa.array([{"bytes": None, "path": str(secret)}] * 6)
    table = pa.table({"text": texts, "label": [row["label"] for row in ROWS]})
    parquet(tmp_path / "damaged.parquet", table.replace_schema_metadata({"huggingface": json.dumps(described)}))
    data = ClassificationData(train=str(tmp_path / "damaged.parquet"), evaluation=str(tmp_path / "damaged.parquet"))
    with pytest.raises(AdapeftError, match=r"data\.") as refused:
        describe(TASKS["sequence-classification"], data)
    assert "secret'" not in str(refused.value)
