"""Hashes of a run's inputs: equal for equal content, different after any change, independent of path and times."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from adapeft.data.content import file_hash, model_hash, rows_hash, sampled_hash
from adapeft.data.sources import load_rows
from adapeft.tasks.describe import describe
from adapeft.tasks.registry import TASKS
from adapeft.tasks.sequence_classification import ClassificationData
from tests.adapeft.model.test_load import save_tokenizer
from tests.support.checkpoints import write_lines

ROWS = [{"text": "a b", "label": 0}, {"text": "c", "label": 1}, {"text": "d é", "label": 0}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def hash_of(rows: datasets.Dataset) -> str:
    return rows_hash(rows, ("text", "label"))


def changed(row: int, **values) -> datasets.Dataset:
    rows = [dict(one) for one in ROWS]
    rows[row].update(values)
    return datasets.Dataset.from_list(rows)


def test_every_change_of_a_value_changes_the_hash():
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    renamed = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["y", "x"])})
    found = [
        hash_of(datasets.Dataset.from_list(ROWS)),
        hash_of(changed(2, text="d e")),
        hash_of(changed(0, text="a", label=0)),
        hash_of(changed(1, text="bc")),
        hash_of(changed(1, label=0)),
        hash_of(datasets.Dataset.from_list([*ROWS, ROWS[0]])),
        hash_of(datasets.Dataset.from_list([ROWS[1], ROWS[0], ROWS[2]])),
        hash_of(datasets.Dataset.from_list(ROWS).cast_column("label", datasets.Value("float64"))),
        hash_of(datasets.Dataset.from_list(ROWS, features=features)),
        hash_of(datasets.Dataset.from_list(ROWS, features=renamed)),
    ]
    assert len(set(found)) == len(found)


def test_the_same_characters_in_other_texts():
    texts = [["a b", "c"], ["a", " bc"], ["a bc", ""]]
    assert len({rows_hash(datasets.Dataset.from_dict({"text": pair}), ("text",)) for pair in texts}) == 3


def messages(*turns, **more):
    return {"messages": [{"role": role, "content": content, **more} for role, content in turns]}


CHAT = [messages(("user", "a"), ("assistant", "b")), messages(("user", "c"))]
OTHER_CHATS = [
    [CHAT[1], CHAT[0]],
    [messages(("user", "a")), messages(("assistant", "b"), ("user", "c"))],
    [messages(("user", "a"), ("assistant", "")), CHAT[1]],
    [messages(("user", "a"), ("assistant", None)), CHAT[1]],
    [messages(("user", "ab"), ("assistant", "")), CHAT[1]],
    [messages(("user", "a"), ("user", "b")), CHAT[1]],
    [messages(("user", "a"), ("assistant", "b"), name="x"), CHAT[1]],
    [messages(("user", "a"), ("assistant", "b"), calls=[{"name": "x"}]), CHAT[1]],
    [messages(("user", "a"), ("assistant", "b"), calls=[{"name": "y"}]), CHAT[1]],
    [{"messages": None}, CHAT[1]],
    [{"messages": []}, CHAT[1]],
]


@pytest.mark.parametrize("is_json", [False, True])
def test_every_change_of_a_nested_value_changes_the_hash(tmp_path, is_json):
    def hash_of(rows, name):
        if not is_json:
            return rows_hash(datasets.Dataset.from_list(rows), ["messages"])
        return rows_hash(load_rows(str(write_lines(tmp_path / f"{name}.jsonl", rows)), "data.train"), ["messages"])

    found = [hash_of(rows, number) for number, rows in enumerate([CHAT, *OTHER_CHATS])]
    assert len(set(found)) == len(found)
    assert hash_of([json.loads(json.dumps(row)) for row in CHAT], "copy") == found[0]
    halves = [datasets.Dataset.from_list([row]) for row in CHAT]
    whole = datasets.Dataset.from_list(CHAT)
    assert rows_hash(datasets.concatenate_datasets(halves), ["messages"]) == rows_hash(whole, ["messages"])


def test_neither_chunks_nor_other_columns_change_the_hash():
    texts = [f"text {n}" for n in range(25_000)]
    whole = datasets.Dataset(pa.table({"text": texts, "label": np.arange(25_000) % 3}))
    cut = pa.concat_tables(
        [whole.data.table.slice(0, 7), whole.data.table.slice(7, 10_001), whole.data.table.slice(10_008)]
    )
    assert hash_of(datasets.Dataset(cut)) == hash_of(whole)
    assert hash_of(whole.add_column("meta", texts)) == hash_of(whole)


def test_a_description_has_the_content_and_not_the_path(tmp_path):
    def described(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(path, (10**9, 10**9))
        return describe(
            TASKS["sequence-classification"], ClassificationData(train=str(path), evaluation=str(path))
        ).content["data.train"]

    before = described("a.jsonl", ROWS)
    assert described("b.jsonl", ROWS) == before
    permuted = [{**row, "label": 1 - row["label"]} for row in ROWS]
    assert described("a.jsonl", permuted) != before, "the same path, size and time of change"
    assert described("a.jsonl", ROWS) == before


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=29,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=19,
            max_position_embeddings=16,
        )
    ).save_pretrained(folder)
    save_tokenizer(folder, pad_token="t0")


def one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[3] += 1e-4  # below the resolution of a fingerprint's bfloat16
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edited(name: str, old: str, new: str):
    def edit(folder: Path) -> None:
        path = folder / name
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        one_weight,
        edited("config.json", '"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-11'),
        edited("tokenizer.json", "Whitespace", "WhitespaceSplit"),
        edited("tokenizer_config.json", "pad_token", "sep_token"),
    ],
    ids=["weight", "config", "tokenizer", "padding"],
)
def test_every_edit_of_a_model_changes_its_hash(tmp_path, edit):
    save_model(tmp_path / "base")
    before = model_hash(str(tmp_path / "base"), None)
    (tmp_path / "base" / "README.md").write_text("a card")
    (tmp_path / "base" / "trainer_state.json").write_text("{}")
    assert model_hash(str(tmp_path / "base"), None) == before
    edit(tmp_path / "base")
    assert model_hash(str(tmp_path / "base"), None) != before


@pytest.mark.parametrize("name", ["spiece.model", "source.spm", "bpe.codes", "tekken.json", "q.tiktoken", "dict.txt"])
def test_every_file_that_a_tokenizer_may_read_counts(tmp_path, name):
    save_model(tmp_path / "base")
    found = {model_hash(str(tmp_path / "base"), None)}
    for content in ("a", "b"):
        (tmp_path / "base" / name).write_text(content)
        found.add(model_hash(str(tmp_path / "base"), None))
    assert len(found) == 3


def test_neither_links_nor_times_change_the_hash_of_a_model(tmp_path):
    save_model(tmp_path / "base")
    before = model_hash(str(tmp_path / "base"), None)
    weights = tmp_path / "base" / "model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    os.utime(weights, (10**9, 10**9))
    (tmp_path / "link").symlink_to(tmp_path / "base")
    assert model_hash(str(tmp_path / "base"), None) == before == model_hash(str(tmp_path / "link"), None)
    (tmp_path / "other").write_bytes((tmp_path / "blob").read_bytes() + b" ")
    weights.unlink()
    weights.symlink_to(tmp_path / "other")
    assert model_hash(str(tmp_path / "base"), None) != before


def test_a_file_is_hashed_by_all_its_bytes(tmp_path):
    content = bytearray(np.random.default_rng(0).bytes(2**24 + 5))
    found = set()
    for place in (None, 0, 2**24 - 1, 2**24 + 4):
        if place is not None:
            content[place] ^= 1
        (tmp_path / "a").write_bytes(content)
        found.add(file_hash(tmp_path / "a"))
    assert len(found) == 4


def test_samples_of_a_file_are_all_of_a_small_one(tmp_path):
    content = bytes(range(256)) * 10_000  # three blocks
    path = tmp_path / "a"

    def hashed(content: bytes) -> str:
        path.write_bytes(content)
        return sampled_hash(path)

    whole = hashed(content)
    assert hashed(content) == whole
    places = (0, 1_500_000, len(content) - 1)
    others = [hashed(content[:place] + b"X" + content[place + 1 :]) for place in places]
    others += [hashed(content[:-1]), hashed(content + b"X"), hashed(b"")]
    assert len({whole, *others}) == 7


def test_samples_of_a_large_file_include_its_end(tmp_path):
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)  # takes no space on the disk
    whole = sampled_hash(path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"X")
    assert sampled_hash(path) != whole
