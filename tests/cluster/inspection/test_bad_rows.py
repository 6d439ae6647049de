"""Rows on which no model can be trained: refused before workers start, or dropped and counted, as the config says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from adapeft.config.load import load_config
from cluster.inspection.inspect import inspect
from tests.support import chats
from tests.support.checkpoints import write_bert, write_config, write_lines
from tests.support.pictures import write_pictures, write_vit

USER, ANSWER, EMPTY = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "hello"), ("assistant", " "))
)
GOOD = {"messages": [USER, ANSWER]}
WITH_TOOLS = "{{ 'You may call ' + tools[0]['function']['name'] }}" + chats.CHATML
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
MARKS_SHORT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] | length < 9 %}{{ message['content'] }}{% endif %}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
"""A template that leaves out long answers, of which therefore no token is trained."""
TAGS = "token-classification"


@dataclass(frozen=True)
class Bad:
    """A row of a conversation that is refused or dropped.

    Attributes:
        row: the row.
        error: what is said of it; None for rows that are dropped whatever the config says.
        refusing: what the config says where it is refused.
        dropping: what the config says where it is dropped.
    """

    row: dict[str, Any]
    error: str | None = None
    refusing: tuple[str, ...] = ()
    dropping: tuple[str, ...] = ("data.invalid=drop",)


LONG = [USER, {**ANSWER, "content": "hello " * 40}]
BAD = {
    "empty-answer": Bad(
        {"messages": [USER, EMPTY]},
        "message 1 (counted from 0), of the assistant, is empty. Drop such rows, or set data.invalid: drop.",
    ),
    "roles-out-of-order": Bad(
        {"messages": [USER, ANSWER, ANSWER]},
        "message 2 (counted from 0), of the assistant, is out of order after one of the assistant. Correct or drop",
    ),
    "template-needs-a-tool": Bad(
        GOOD,
        "The template reads tools, of which the row has none (column 'tools'). Correct or drop such rows, or set "
        "data.invalid: drop.",
        (f"data.chat_template={WITH_TOOLS}",),
        ("data.invalid=drop", f"data.chat_template={WITH_TOOLS}"),
    ),
    "too-long": Bad(
        {"messages": LONG},
        "tokens, more than data.max_length = 128. Raise that, or set data.too_long: truncate or drop.",
        ("data.too_long=error",),
        ("data.too_long=drop",),
    ),
    "masked-by-truncation": Bad({"messages": [{**USER, "content": "hi " * 60}, ANSWER]}, dropping=()),
    "masked-by-the-template": Bad(
        {"messages": LONG},
        "no token of it is trained. Correct or drop such rows, or set data.invalid: drop.",
        (f"data.chat_template={MARKS_SHORT}",),
        ("data.invalid=drop", f"data.chat_template={MARKS_SHORT}"),
    ),
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = chats.make_tokenizer()
    shape = {"n_positions": 128, "n_embd": 8, "n_layer": 1, "n_head": 1}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path, gpt2):
    """Return a function that writes a config for the rows."""

    def write(rows, model=gpt2, task="instruct"):
        data = write_lines(tmp_path / "rows.jsonl", rows)
        return write_config(tmp_path / "run.yaml", model, data, data, task)

    return write


SMALL = ("data.max_length=128", "select.calibration=4", "select.batch_size=4", "train.batch_size=4", "budget=50%")
IN_BOTH = tuple(f"data.{split}: 1 of 9 examples dropped" for split in ("train", "evaluation"))


def dropped(config, *options):
    """Return what a run says that it dropped, without what it truncated."""
    return tuple(note.split(",")[0] for note in inspect(load_config(config, options)).notes)


def refusal(command, config, *options):
    done = command("run", config, *options)
    assert done.returncode == 2, done
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_conversation_is_refused_or_dropped_and_counted(command, config, bad):
    tools = {"tools": [TOOL]} if any("tools" in option for option in bad.dropping) else {}
    path = config([*[{**GOOD, **tools}] * 8, bad.row])
    if bad.error is not None:
        said = refusal(command, path, *SMALL, *bad.refusing)
        assert "data.train: row 8 (counted from 0): " in said
        assert bad.error in said
    assert dropped(path, *SMALL, *bad.dropping) == IN_BOTH


def test_conversations_that_are_all_too_long(command, config):
    said = refusal(command, config([{"messages": LONG}] * 9), *SMALL, "data.too_long=drop")
    assert "data.train: all 9 conversations are dropped; the first is row 0: it has " in said
    assert "tokens, more than data.max_length = 128." in said


def test_a_missing_template(command, config, gpt2, tmp_path):
    tokenizer = chats.make_tokenizer(None)
    GPT2LMHeadModel.from_pretrained(gpt2).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    said = refusal(command, config([GOOD] * 8, tmp_path / "base"), *SMALL, "data.invalid=drop")
    assert "its tokenizer has no chat template, which turns messages into text. Set data.chat_template" in said


def test_tags_that_do_not_align_with_words(command, config, tmp_path):
    rows = [{"tokens": ["the", "sea"], "ner_tags": ["O", "B-X"]}] * 8
    path = config([*rows, {"tokens": ["the", "sea"], "ner_tags": ["O"]}], write_bert(tmp_path / "base"), TAGS)
    said = refusal(command, path, *SMALL[1:])
    assert "data.train: row 8 (counted from 0): data.label = 'ner_tags' has 1 tags for 2 words. Correct or drop" in said
    assert dropped(path, *SMALL[1:], "data.invalid=drop") == IN_BOTH


def test_what_is_no_image(command, config, tmp_path):
    rows = write_pictures(tmp_path / "all", 9, seed=0)
    (tmp_path / "all" / "4.png").write_text("no image")
    write_vit(tmp_path / "vit")
    path = config(rows, tmp_path / "vit", "image-classification")
    path.write_text(path.read_text().replace("max_length: 16", "label: labels"))
    said = refusal(command, path, *SMALL[1:])
    assert (
        "data.train: row 4 (counted from 0): data.image = 'image' is not an image: cannot identify image file" in said
    )
    assert "or set data.invalid: drop." in said
    assert dropped(path, *SMALL[1:], "data.invalid=drop") == IN_BOTH


def test_the_check_shows_how_many_rows_are_tokenized(config, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    events = []
    inspect(load_config(config([GOOD] * 9), SMALL), events.append)
    last = {event["step"]: (event["done"], event["total"]) for event in events}
    assert last["tokenizing data.train"] == (9, 9)


@pytest.mark.parametrize(
    ("name", "more", "returncode"),
    [
        ("estimate", (), 0),
        ("compare", ("select.groups=row", "methods=[random,adapeft]"), 2),  # refused once the rows are tokenized
    ],
)
def test_a_command_without_a_session_shows_it_too(command, config, tmp_path, monkeypatch, name, more, returncode):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    done = command(name, config([GOOD] * 9), *SMALL, *more)
    assert done.returncode == returncode, done.stderr
    assert "checking config, data and model …\ntokenizing data.train 9/9\n" in done.stdout
