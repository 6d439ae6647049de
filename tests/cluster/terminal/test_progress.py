"""Progress on a terminal: what stays there, and what the next event replaces."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.terminal import progress


@pytest.mark.parametrize(("more", "stays"), [({}, False), ({"is_note": True}, True)])
def test_notes_stay_on_a_terminal(more, stays, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    printed = []
    monkeypatch.setattr(console, "print", lambda text, **options: printed.append(str(text)))
    with progress.watching(console, "training: starting workers", "training: ") as watch:
        watch({"step": "logits are not split", **more})
    assert ("training: logits are not split" in printed) == stays


def test_notes_are_lines_elsewhere():
    file = io.StringIO()
    with progress.watching(Console(file=file), "training: starting workers", "training: ") as watch:
        watch({"step": "logits are not split", "is_note": True})
    assert "training: logits are not split\n" in file.getvalue()


@pytest.mark.parametrize(
    ("metric", "line"),
    [("accuracy", "step 9: accuracy 0.5000, loss 1.2500"), ("loss", "step 9: loss 1.2500")],
)
def test_an_evaluation_names_each_score_once(metric, line):
    file = io.StringIO()
    with progress.watching(Console(file=file), "train: starting workers", "train: ") as watch:
        watch({"step": "evaluated", "is_note": True, "at": 9, "metric": metric, metric: 0.5, "loss": 1.25})
    assert f"train: {line}\n" in file.getvalue()
