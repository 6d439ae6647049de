"""The cache that the processes of a machine share."""

from __future__ import annotations

import json
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers.normalizers import Lowercase

from adapeft.data.cache import Cache
from adapeft.data.sources import load_rows
from adapeft.errors import AdapeftError
from adapeft.sections.data import TextData
from adapeft.tasks.describe import describe
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.registry import TASKS
from tests.adapeft.data.test_description import tokenizer
from tests.support.processes import FORKS

ROOT = Path(__file__).parents[3]
LABELLED = {
    "sequence-classification": lambda row: ["no", "yes", "perhaps"][row % 3],
    "multi-label-classification": lambda row: [["a"], ["b", "c"], []][row % 3],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "adapeft"


def text(row):
    return " ".join(["a fish", "two fish swim", "fish"][row % 3] for _ in range(1 + row % 5))


def data_of(task, tmp_path, suffix=".jsonl", **options):
    path = tmp_path / f"rows{suffix}"
    label = LABELLED.get(task, LABELLED["sequence-classification"])
    path.write_text("".join(json.dumps({"text": text(row), "label": label(row)}) + "\n" for row in range(2500)))
    return TASKS[task].data(train=str(path), evaluation=str(path), max_length=6, **options)


def tokens(data, cache=None, used=None):
    task = TASKS[data.task]
    return task.tokenize(
        load_rows(data.train, "data.train"), data, used or tokenizer(), describe(task, data), cache or Cache()
    )


def entries(cache, kind="tokens"):
    return sorted(path for path in cache.glob(f"{kind}-*") if path.is_dir())


def is_mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if issubclass(task.data, TextData)])
def test_the_same_batches(task, tmp_path, cache):
    """Against the tokenizer itself, for every example and bit for bit, when made and when read again."""
    data, own = data_of(task, tmp_path), tokenizer()
    texts = [text(row) for row in range(2500)]
    if task == "causal-lm":
        ids = own(texts, add_special_tokens=False)["input_ids"]
        end = [] if own.eos_token_id is None else [own.eos_token_id]
        flat = [token for one in ids for token in one + end]
        expected = torch.tensor(flat[: len(flat) // 6 * 6]).view(-1, 6)
    elif task == "masked-lm":
        own.add_special_tokens({"mask_token": "[MASK]"})
        flat = [
            token for one in own(texts, add_special_tokens=False)["input_ids"] for token in [*one, own.sep_token_id]
        ]
        blocks = torch.tensor(flat[: len(flat) // 4 * 4]).view(-1, 4)
        expected = F.pad(F.pad(blocks, (1, 0), value=own.cls_token_id), (0, 1), value=own.sep_token_id)
    else:
        expected = own(texts, truncation=True, max_length=6, padding=True, return_tensors="pt")["input_ids"]
    for _ in range(2):
        found = tokens(data, used=own)
        batch = found.collate(range(len(found)))
        ids = batch.inputs["input_ids"]
        if task == "masked-lm":  # the labels are the tokens in the place of masks
            ids = torch.where(batch.labels == IGNORED, ids, batch.labels)
        assert torch.equal(ids, expected)
        assert found.lengths == batch.inputs["attention_mask"].sum(1).tolist()
        in_memory = TASKS[task].tokenize(load_rows(data.train, "data.train"), data, own, describe(TASKS[task], data))
        again = in_memory.collate(range(len(found)))
        assert torch.equal(batch.labels, again.labels)
        assert batch.labels.dtype == again.labels.dtype
        assert all(torch.equal(batch.inputs[name], again.inputs[name]) for name in again.inputs)
    [entry] = entries(cache)
    assert is_mapped(entry / "rows.arrow")
    [parsed] = entries(cache, "rows")
    rows = load_rows(data.train, "data.train")
    assert len(rows) == 2500
    assert is_mapped(parsed / "rows.arrow")


def test_every_dependency_gives_another_entry(tmp_path, cache):
    data = data_of("sequence-classification", tmp_path)
    added, lowered, left = tokenizer(), tokenizer(), tokenizer()
    added.add_tokens(["swim fish"])
    lowered.backend_tokenizer.normalizer = Lowercase()
    left.truncation_side = "left"
    calls = [(data, tokenizer()), (data.model_copy(update={"max_length": 5}), tokenizer())]
    calls += [(data, added), (data, lowered), (data, left)]
    calls += [(data_of("causal-lm", tmp_path), tokenizer())]
    for count, (options, used) in enumerate(calls, 1):
        tokens(options, used=used)
        assert len(entries(cache)) == count
    Path(data.train).write_text(Path(data.train).read_text().replace("two", "no"))
    tokens(data)
    assert len(entries(cache)) == len(calls) + 1


def test_what_does_not_matter_keeps_the_entry(tmp_path, cache):
    """The path, the time, the labels, and the calls that the tokenizer has had do not count."""
    data, used = data_of("sequence-classification", tmp_path), tokenizer()
    tokens(data, used=used)
    used(["a fish"], truncation=True, max_length=3, padding="max_length")
    moved = Path(data.train).rename(tmp_path / "moved.jsonl")
    moved.write_text(moved.read_text().replace("perhaps", "maybe"))
    tokens(data.model_copy(update={"train": str(moved), "evaluation": str(moved)}), used=used)
    assert len(entries(cache)) == 1
    assert len(entries(cache, "labels")) == 2


@pytest.mark.parametrize("kind", ["tokens", "labels", "rows"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_made_again(kind, damage, tmp_path, cache):
    data = data_of("sequence-classification", tmp_path)
    expected = tokens(data).collate(range(2500))
    [entry] = entries(cache, kind)
    [file] = [path for path in entry.iterdir() if path.suffix != ".json"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # not in place: this process still maps the old one
    if damage != "missing":
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.warns(UserWarning, match=f"{entry.name}: is damaged"):
        found = tokens(data).collate(range(2500))
    assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
    assert torch.equal(found.labels, expected.labels)


def make_half(cache: Path, made: Path, num_steps: int, answers) -> None:
    """Make an entry slowly, and say what it holds and whether progress was reported."""
    datasets.config.HF_DATASETS_CACHE = cache.parent

    def make(folder, progress):
        (folder / "half").write_text("ha")
        with made.open("a") as file:
            file.write("x")
        for step in range(num_steps):
            progress(step, 20)
            time.sleep(0.1)
        (folder / "half").write_text("half and half")

    seen = []
    folder = Cache(lambda done, total: seen.append((done, total))).folder("test", {"a": 1}, make)
    answers.put(((folder / "half").read_text(), len(seen) > 0))


def start(cache, made, num_steps):
    """Start a process that makes an entry; return it and the queue of its answer."""
    answers = FORKS.Queue()
    process = FORKS.Process(target=make_half, args=(cache, made, num_steps, answers))
    process.start()
    return process, answers


def test_two_processes_make_one_entry(tmp_path, cache):
    """The one that waits reports the progress of the other."""
    started = [start(cache, tmp_path / "made", 20) for _ in range(2)]
    assert [answers.get(timeout=300) for _, answers in started] == [("half and half", True)] * 2
    assert (tmp_path / "made").read_text() == "x"


def test_a_killed_writer_neither_blocks_nor_is_read(tmp_path, cache):
    killed, _ = start(cache, tmp_path / "made", 3000)
    while not list(cache.glob("test-*/half")):
        assert killed.is_alive()
        time.sleep(0.05)
    killed.kill()
    killed.join()
    [left] = entries(cache, "test")
    _, answers = start(cache, tmp_path / "made", 1)
    assert answers.get(timeout=300) == ("half and half", True)
    [entry] = entries(cache, "test")
    assert entry != left


def test_a_failed_maker_leaves_nothing(cache):
    def make(folder, progress):
        (folder / "file").write_text("half")
        raise AdapeftError("no tokens")

    for _ in range(2):
        with pytest.raises(AdapeftError, match="no tokens"):
            Cache().folder("test", {}, make)
    assert not entries(cache, "test")


def test_a_cache_that_cannot_be_written(cache, tmp_path):
    cache.parent.write_text("a file, which not even root can write into")
    with pytest.raises(AdapeftError, match=r"^HF_DATASETS_CACHE = .*cannot be written.*Set the environment variable"):
        tokens(data_of("sequence-classification", tmp_path))


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    data = data_of("sequence-classification", tmp_path)

    def read(path):
        path.write_text('{"text": "new", "label": 0}\n')
        return datasets.Dataset.from_list([{"text": "new", "label": 0}])

    monkeypatch.setattr("adapeft.data.sources.read_json", read)
    with pytest.raises(AdapeftError, match="has changed while it was read"):
        load_rows(data.train, "data.train")


def test_progress(tmp_path):
    seen = []
    tokens(data_of("sequence-classification", tmp_path), Cache(lambda *numbers: seen.append(numbers)))
    assert np.array(seen).tolist() == [[1000, 2500], [2000, 2500], [2500, 2500]]
