"""A delta and a merged checkpoint reach the hub whole or not at all, with a card whose code loads them."""

from __future__ import annotations

import json
import re
import shutil
import socket

import pytest
import torch
import yaml
from huggingface_hub import HfFileSystem, ModelCard, constants
from transformers import AutoModelForSequenceClassification

from adapeft import Delta
from adapeft.config.load import load_config
from adapeft.config.write import to_yaml
from adapeft.model.fingerprint import fingerprint_model
from adapeft.parts.change import Change
from adapeft.parts.rows import Rows
from adapeft.subset.store import hash_of
from cluster.commands.push.card import card_of_run
from cluster.output.folder import RunFolder
from cluster.output.report import write_report
from tests.cluster.output.test_report import write_run
from tests.support.checkpoints import write_classifier
from tests.support.hub import TOKEN, Repo, serving

UPLOADED = {"README.md", "config.yaml", "delta.safetensors", "metrics.json", "subset.safetensors"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serve an empty hub, to which the user has a token."""
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        HfFileSystem.clear_instance_cache()
        yield served
        HfFileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a finished run on a classifier, and the classifier's folder."""
    folder = tmp_path_factory.mktemp("pushed")
    base = write_classifier(folder / "base", 3)
    run, config = write_run(folder / "run")
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": str(base)})})
    run.config.write_text(to_yaml(config))
    metrics = json.loads(run.metrics.read_text())
    run.metrics.write_text(json.dumps(metrics | {"num_steps": 20, "provenance": {"versions": {"torch": "2.0"}}}))
    labels = {"num_labels": 3, "id2label": dict(enumerate(("blue", "green", "red")))}
    said = {"task": "sequence-classification", "labels": labels, "name": str(base)}
    model = AutoModelForSequenceClassification.from_pretrained(base)
    changes = {"classifier.weight": Change(Rows((3, 16), torch.tensor([0, 2]), 0), torch.randn(2, 16))}
    Delta(changes, {}, fingerprint_model(model), {"method": "random", "model": said, "config": to_yaml(config)}).save(
        run.delta
    )
    return run, base


def files_of(hub, name="me/tiny"):
    return hub.repos[name].files


def card_of(hub, name="me/tiny"):
    return ModelCard(files_of(hub, name)["README.md"].decode())


def test_a_run_is_pushed_in_one_commit_and_its_card_loads_it(command, hub, trained, monkeypatch):
    run, base = trained
    done = command("push", run.path, "me/tiny")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/tiny"]
    assert done.stdout == f"{hub.url}/me/tiny/commit/{repo.sha}\n"
    assert (repo.private, repo.commits, set(repo.files)) == (True, 1, UPLOADED)
    assert repo.files["delta.safetensors"] == run.delta.read_bytes()

    card = card_of(hub)
    assert card.data["adapeft_delta"] == hash_of(run.delta)
    assert card.data.tags == ["adapeft"]
    text = card.text
    for row in ("| accuracy | 0.2500 → 0.7500 |", "| budget | 0.5% |", "| data | train.jsonl |", "| model | base |"):
        assert row in text, text
    assert str(base.parent) not in text, "paths of this machine mean nothing elsewhere"

    monkeypatch.chdir(base.parent)
    scope = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    expected = AutoModelForSequenceClassification.from_pretrained(base)
    Delta.load(run.delta).apply(expected)
    assert scope["model"].config.id2label == {0: "blue", 1: "green", 2: "red"}
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(scope["model"].state_dict()[name], value, rtol=0, atol=0)

    line = re.search(r"```\nadapeft (merge .*)\n```", text)[1]
    assert line == "merge hf://me/tiny/delta.safetensors --model base --out merged"
    done = command(*line.split())
    assert done.returncode == 0, done.stderr
    merged = AutoModelForSequenceClassification.from_pretrained("merged").state_dict()
    assert all(torch.equal(merged[name], value) for name, value in expected.state_dict().items())


def test_the_card_loads_the_revision_that_was_trained(trained):
    run, _ = trained
    config, delta = load_config(run.config), Delta.load(run.delta)
    base = {"name": "org/base", "revision": "v1.0", "trust_remote_code": True}
    config = config.model_copy(update={"model": config.model.model_copy(update=base)})
    card = card_of_run(config, json.loads(run.metrics.read_text()), delta, "me/tiny", "0", [])
    assert 'from_pretrained("org/base", revision="v1.0", trust_remote_code=True, id2label=' in card.text
    assert "adapeft merge hf://me/tiny/delta.safetensors --model org/base --revision v1.0 --out merged" in card.text


def test_pictures_are_pushed_and_shown_in_the_card(command, hub, trained, tmp_path):
    """The report quotes generated answers, and stays."""
    folder = RunFolder(shutil.copytree(trained[0].path, tmp_path / "run"))
    write_report(folder, load_config(folder.config))
    assert folder.report.is_file()
    pictures = {path.name: path.read_bytes() for path in folder.pictures.iterdir() if path.suffix == ".png"}
    assert pictures
    done = command("push", folder.path, "me/tiny")
    assert done.returncode == 0, done.stderr
    files = files_of(hub)
    assert set(files) == UPLOADED | {f"pictures/{name}" for name in pictures}
    shown = re.findall(r"!\[.*?\]\((.*?)\)", card_of(hub).text)
    assert sorted(shown) == sorted(f"pictures/{name}" for name in pictures)
    assert all(files[f"pictures/{name}"] == content for name, content in pictures.items())


def test_the_same_delta_may_be_pushed_again_but_nothing_else(command, hub, trained):
    run, _ = trained
    assert command("push", run.path, "tiny", "--public").returncode == 0
    assert not hub.repos["me/tiny"].private
    assert command("push", run.path, "me/tiny", "--public").returncode == 0
    assert hub.repos["me/tiny"].commits == 2

    hub.repos["me/tiny"].files["README.md"] = str(ModelCard("---\nadapeft_delta: other\n---\n# Other")).encode()
    hub.repos["me/model"] = Repo(private=True, files={".gitattributes": b"", "model.safetensors": b"theirs"})
    for name, option in (("me/tiny", "--public"), ("me/model", "--private")):
        done = command("push", run.path, name, option)
        assert done.returncode == 2
        assert re.search(rf"{name} exists and holds something else \(.*safetensors.*Give another name", done.stderr)
    assert files_of(hub, "me/model") == {".gitattributes": b"", "model.safetensors": b"theirs"}
    assert hub.repos["me/tiny"].commits == 2


@pytest.mark.parametrize(("private", "option"), [(False, "--private"), (True, "--public")])
def test_visibility_is_never_other_than_asked_for(command, hub, trained, private, option):
    hub.repos["me/tiny"] = Repo(private=private)
    done = command("push", trained[0].path, "me/tiny", option)
    assert done.returncode == 2
    now = "private" if private else "public"
    assert f"me/tiny exists and is {now}. Say so with --{now}, or give another name." in done.stderr
    assert not files_of(hub)


@pytest.mark.parametrize(
    ("path", "status", "exit_status", "message"),
    [
        ("/api/whoami-v2", 401, 2, "Its token is invalid"),
        ("/api/repos/create", 403, 2, "Give a token that may write there"),
        ("/lfs/", 403, 1, "the hub cannot be reached"),
        ("/api/models/me/tiny/commit", 412, 2, "Somebody else has changed the repository"),
        ("/api/models/me/tiny/commit", 500, 1, "push again"),
    ],
)
def test_a_refusal_leaves_nothing_half_uploaded(command, hub, trained, path, status, exit_status, message):
    if not path.startswith("/api/repos"):
        hub.repos["me/tiny"] = Repo(private=True)
    hub.refusals[path] = status, "the reason of the hub"
    done = command("push", trained[0].path, "me/tiny")
    assert done.returncode == exit_status
    assert message in done.stderr
    assert not any(repo.files for repo in hub.repos.values())


def test_no_token_no_network_and_no_name(command, hub, trained, monkeypatch):
    done = command("push", trained[0].path, "not/a/name")
    assert done.returncode == 2
    assert "not/a/name: no name of a repository" in done.stderr
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        done = command("push", trained[0].path, "me/tiny")
    assert done.returncode == 1
    assert "me/tiny: the hub cannot be reached" in done.stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_file", lambda: None)
    done = command("push", trained[0].path, "me/tiny")
    assert done.returncode == 2
    assert "no token for the hub. Run `hf auth login`, or set HF_TOKEN." in done.stderr


def test_only_trained_runs_without_secrets_are_pushed(command, hub, trained, tmp_path):
    run, _ = trained
    done = command("push", tmp_path, "me/tiny")
    assert (done.returncode, "not the folder of a run" in done.stderr) == (2, True)
    untrained, _ = write_run(tmp_path / "run")
    untrained.config.write_text(run.config.read_text())
    done = command("push", untrained.path, "me/tiny")
    assert (done.returncode, "has no trained delta yet. Finish it: adapeft run" in done.stderr) == (2, True)
    untrained.delta.write_bytes(run.delta.read_bytes())
    content = yaml.safe_load(run.config.read_text())
    content["train"]["subset"] = "https://bucket/subset.safetensors?X-Amz-Signature=abc"
    untrained.config.write_text(yaml.safe_dump(content))
    done = command("push", untrained.path, "me/tiny")
    assert (done.returncode, "train.subset of its config is a URL with a password" in done.stderr) == (2, True)
    assert not hub.requests


@pytest.mark.slow
def test_a_merged_checkpoint_is_pushed_with_a_card_that_loads_it(command, hub, trained, tmp_path):
    run, base = trained
    hub.repos["me/taken"] = Repo(private=True, files={"model.safetensors": b"theirs"})
    arguments = ("merge", run.delta, "--model", base, "--out", tmp_path / "merged", "--push")
    done = command(*arguments, "me/taken")
    assert done.returncode == 2
    assert "me/taken exists and holds something else" in done.stderr
    assert not (tmp_path / "merged").exists(), "found out before merging"

    done = command(*arguments, "me/tiny")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "merged"),
        f"{hub.url}/me/tiny/commit/{hub.repos['me/tiny'].sha}",
    ]
    text = card_of(hub).text
    assert "| budget | 0.5% |" in text
    assert "adapeft" not in re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    scope = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(scope["model"].state_dict()[name], value, rtol=0, atol=0)
