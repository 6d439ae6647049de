"""A stream is inspected by its first rows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from cluster.commands.compare.examples import held_out
from cluster.inspection.inspect import inspect
from cluster.terminal.console import Terminal
from tests.support.checkpoints import write_config, write_gpt2, write_lines


@pytest.fixture
def config(tmp_path):
    """Return a function that loads a config of texts, whose row 5000 is none."""
    texts = [{"text": "the sea is blue"}] * 5000
    train = write_lines(tmp_path / "train.jsonl", [*texts, {"text": None}])
    evaluation = write_lines(tmp_path / "validation.jsonl", texts[:90])
    path = write_config(tmp_path / "run.yaml", write_gpt2(tmp_path / "base"), train, evaluation, task="causal-lm")
    return lambda *overrides: load_config(path, ["data.streaming=true", "max_steps=5", *overrides])


def test_only_the_first_rows_are_read(config):
    written = io.StringIO()
    inspection = inspect(config())
    Terminal(Console(file=written, width=200)).show_inputs(config(), inspection)
    assert "streamed training texts, 90 evaluation texts" in written.getvalue()
    assert "train.jsonl as a stream, 90 rows of 90 lines in validation.jsonl" in written.getvalue()
    assert inspection.num_tokens == 16
    with pytest.raises(AdapeftError, match=r"row 5000 of data.train \(counted from 0\) has None"):
        inspect(config("data.streaming=false"))


def test_what_the_first_rows_show_is_refused(config, tmp_path):
    with pytest.raises(AdapeftError, match=r"data.max_length = 64: the model has 32 positions"):
        inspect(config("data.max_length=64"))
    with pytest.raises(AdapeftError, match=r"data.text = 'words': data.train has no such column"):
        inspect(config("data.text=words"))
    few = write_lines(tmp_path / "few.jsonl", [{"text": "the sea is blue"}] * 4)
    with pytest.raises(AdapeftError, match=r"select.calibration = 160 with data.train of 1 examples"):
        inspect(config(f"data.train={few}"))


def test_any_token_of_a_stream_needs_an_embedding(config, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["violet"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapeftError, match=r"a stream, which may hold any token\): the tokenizer .* maps 'violet'"):
        inspect(config())


def test_a_stream_is_not_divided(config, tmp_path):
    with pytest.raises(AdapeftError, match=r"data.streaming = true: to leave out a part of data.train, compare has to"):
        held_out(config(), 0.1, tmp_path)
