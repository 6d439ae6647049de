"""The documents: links have targets, Python code runs, YAML is a valid config, and commands exist."""

from __future__ import annotations

import copy
import re
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from typer.main import get_command

import adapeft
from adapeft.config.load import load_config
from adapeft.tune.attachment import attachment_of
from cluster.cli import app
from tests.oracles.leaves import logits, train
from tests.support.tiny import make_batches, make_bert
from tests.support.trainers import examples

ROOT = Path(__file__).parents[1]
# Outputs of make and of runs are not part of the repository.
GENERATED = ("build", "runs")
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not (parts := path.relative_to(ROOT).parts)[0].startswith(".") and parts[0] not in GENERATED
)
READMES = [path for path in DOCUMENTS if path.name == "README.md"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(document: str, language: str) -> list[str]:
    """Return the fenced blocks of a document in a language, which is empty for shell commands."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [content for found, content in FENCE.findall(text) if found == language]


def anchors(path: Path) -> set[str]:
    """Return the anchors of all headings, as GitHub generates them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def load() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained("path-or-hub-name", num_labels=3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a working directory that contains the base model named in the documents."""
    monkeypatch.chdir(tmp_path)
    make_bert().bert.save_pretrained("path-or-hub-name")
    return tmp_path


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_and_targets_exist(path):
    shell = "\n".join(blocks(name_of(path), ""))
    commands = set(re.findall(r"^(?:\S*/)?adapeft ([a-z]+)", shell, re.MULTILINE))
    targets = set(re.findall(r"^make ([a-z]+)", shell, re.MULTILINE))
    assert commands <= set(get_command(app).commands)
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_first_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_yaml_is_a_config(path, tmp_path):
    for number, text in enumerate(blocks(name_of(path), "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text, encoding="utf-8")
        assert load_config(file).select.method == "adapeft"


def test_the_trainer_trains_a_subset_by_the_first_lines_of_python(folder):
    (lines,) = blocks("README.md", "python")
    names = {"train_dataset": examples(make_bert())}
    exec(lines, names)
    model, fresh = names["model"], load()
    assert 0 < attachment_of(model).subset.count <= 0.005 * names["subset"].choice.num_total
    model.eval()
    delta = adapeft.Delta.load("delta.safetensors")
    assert any(change.has_moved for change in delta.changes.values())
    delta.apply(fresh)  # its new head has other random values; the delta contains the trained head
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)
    names["trainer"].save_model("trained")
    loaded = AutoModelForSequenceClassification.from_pretrained("trained")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_a_subset_lives_from_select_to_a_merged_checkpoint(folder):
    every = iter(blocks("adapeft/README.md", "python"))
    choosing, shipping, preferring, of_head, without_delta, resuming, swapping = islice(every, 7)
    model = load()
    names = {"model": model, "batches": make_batches(model), "fresh_model": load()}
    exec(choosing, names)
    more = {"train_dataset": examples(model), "arguments": TrainingArguments("out", max_steps=1, report_to=[])}
    tried = {"torch": torch, "Trainer": Trainer, **more, **names, "model": copy.deepcopy(model)}
    exec(of_head, tried)
    (rate,) = {group["lr"] for group in tried["optimizer"].param_groups if group.get("is_head")}
    assert rate == tried["rate"] != 1e-3
    tried["trainer"].train()
    train(model)
    trained = logits(model)
    exec(shipping, names)
    for checkpoint in ("merged", "trained"):
        loaded = AutoModelForSequenceClassification.from_pretrained(folder / checkpoint)
        torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(names["fresh_model"]), logits(load()))
    names["batch"] = names["batches"][0]
    inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in names["batches"][:-1]]
    pairs = [{"chosen": one, "rejected": other} for one, other in pairwise(inputs)]
    preferred = {"adapeft": adapeft, "model": load(), "pairs": pairs}
    exec(preferring, preferred)
    assert preferred["subset"].count
    exec(without_delta, names)
    assert not torch.equal(names["reference"], model(**names["batch"]).logits)
    model.save_pretrained("out/checkpoint-500", is_main_process=True, state_dict=None)  # as the Trainer calls it
    exec(resuming, {"adapeft": adapeft, "fresh_model": (resumed := load())})
    assert torch.equal(logits(resumed), logits(model))

    served = load()
    exec(swapping, {"adapeft": adapeft, "model": served, "a": names["delta"], "b": names["delta"]})
    assert torch.equal(logits(served), logits(load()))


def test_a_rule_is_kept_in_a_loop_of_ones_own(folder):
    (following,) = blocks("adapeft/methods/README.md", "python")[:1]
    model = load()
    subset = adapeft.select(model, make_batches(model), method="child-pruning", budget=50)
    adapeft.attach(model, subset)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    exec(following, {"adapeft": adapeft, "model": model, "optimizer": optimizer})
    for batch in make_batches(model):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changes = adapeft.delta(model).changes.values()
    assert 0 < sum(int((change.values != 0).sum()) for change in changes) <= 50


def test_the_solver_answers_what_its_comment_says():
    (lines,) = blocks("solver/README.md", "python")
    names: dict = {}
    exec(lines, names)
    solution = names["solution"]
    told = lines.rpartition("# ")[2].strip()
    assert told == f"{solution.chosen.tolist()}, {solution.value}, {solution.bound}, {solution.status}"


def test_the_version_to_cite_is_in_the_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == adapeft.__version__
    assert f"## [{adapeft.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
