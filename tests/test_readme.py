"""The README: its links lead to files, and its lines of Python run."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from tests.oracles.leaves import logits, train
from tests.support.tiny import make_batches, make_bert

ROOT = Path(__file__).parents[1]


def test_links_lead_to_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_lines_of_python_run_from_select_to_a_merged_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_bert().bert.save_pretrained("path-or-hub-name")

    def load() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained("path-or-hub-name", num_labels=3)

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text[text.index("## In your own script") :].split("```python\n")[1].split("```")[0]
    before, after = lines.split("delta = adapeft.delta(model)\n")
    model = load()
    names = {"model": model, "batches": make_batches(model), "fresh_model": load()}
    exec(before, names)
    train(model)
    trained = logits(model)
    exec("delta = adapeft.delta(model)\n" + after, names)
    for folder in ("merged", "trained"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(names["fresh_model"]), logits(load()))
