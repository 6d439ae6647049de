"""Tests of references to a subset: a path, a URL, or a name in the store."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from adapeft.config.load import load_config, parse_config
from adapeft.config.write import to_yaml
from adapeft.errors import AdapeftError
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.entry import Summary
from adapeft.subset.locate import locate
from adapeft.subset.store import STORE_VARIABLE, SubsetStore, default_store
from adapeft.subset.subset import Subset

CONFIG = {
    "model": {"name": "bert", "task": "causal-lm"},
    "data": {"train": "glue:cola@train", "evaluation": "glue:cola@validation"},
    "output": "run",
}


@pytest.fixture
def subset():
    return Subset({"weight": Whole((3, 4))}, choice=Choice(method="sam", budget=20, fingerprint="f"))


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch, subset):
    """Return the user's store with one subset in it; the working directory is elsewhere."""
    monkeypatch.setenv(STORE_VARIABLE, str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    subset.save(tmp_path / "chosen.safetensors")
    store = SubsetStore()
    store.add("cola", tmp_path / "chosen.safetensors", subset.summary())
    return store


def test_a_name(store):
    assert Subset.load("cola").parts == {"weight": Whole((3, 4))}
    assert locate("cola") == store.fetch(store.get("cola"))


def test_a_file_wins(subset):
    subset.save("cola")
    assert locate("cola") == Path("cola")
    assert Subset.load("cola").count == 12


def test_a_folder_does_not():
    Path("cola").mkdir()
    assert Subset.load("cola").count == 12


@pytest.mark.parametrize("path", ["./cola", "cola.safetensors", "/cola"])
def test_paths_are_not_looked_up(path):
    with pytest.raises(AdapeftError, match="no such file; expected a subset"):
        Subset.load(path)
    with pytest.raises(AdapeftError, match="cola: no such file; expected a subset"):
        Subset.load(Path("cola"))


@pytest.mark.parametrize("url", ["memory://away/it.safetensors", "file://{}/it.safetensors"])
def test_urls(url, subset, tmp_path):
    url = url.format(tmp_path)
    with pytest.raises(AdapeftError, match="cannot be read"):
        Subset.load(url)
    with fsspec.open(url, "wb") as file:
        file.write((tmp_path / "chosen.safetensors").read_bytes())
    assert Subset.load(url).choice.method == "sam"


def test_an_unknown_name():
    with pytest.raises(AdapeftError, match=r"'coal': no such subset in the store .*store. Did you mean 'cola'"):
        Subset.load("coal")


def test_what_is_stored_has_to_be_a_subset(store, tmp_path):
    (tmp_path / "foreign").write_bytes(b"of somebody else")
    store.add("foreign", tmp_path / "foreign", Summary(count=1))
    with pytest.raises(AdapeftError, match="is not a subset, or it is truncated"):
        Subset.load("foreign")


def test_a_config_keeps_a_name(tmp_path):
    """Paths become absolute, for workers that run in other folders."""

    def kept(place):
        return parse_config({**CONFIG, "train": {"subset": place}}).resolved().train.subset

    assert kept("cola") == "cola"
    assert kept("memory://away/it") == "memory://away/it"
    assert kept("runs/cola") == str(Path.cwd() / "runs/cola")
    assert kept("cola.safetensors") == str(Path.cwd() / "cola.safetensors")
    Path("config.yaml").write_text(to_yaml(parse_config({**CONFIG, "train": {"subset": "cola"}}).resolved()))
    assert load_config("config.yaml").train.subset == "cola"


def test_where_the_store_is(monkeypatch):
    monkeypatch.delenv(STORE_VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_store() == "/data/adapeft/subsets"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_store() == str(Path.home() / ".local/share/adapeft/subsets")


def test_the_summary_of_a_header(subset):
    said = subset.described(config=to_yaml(parse_config(CONFIG))).summary()
    assert (said.base, said.task, said.data) == ("bert", "causal-lm", "glue:cola@train")
    assert (said.method, said.budget, said.count, said.fingerprint, said.after) == ("sam", 20, 12, "f", {})
    assert subset.summary().base is None
    with pytest.raises(AdapeftError, match="the description of the subset is damaged"):
        subset.described(config="model: [1").summary()
    with pytest.raises(AdapeftError, match="the description of the subset is damaged"):
        subset.described(budget="much").summary()
