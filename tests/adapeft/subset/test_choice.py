"""Tests of the record of a choice: typed fields, and files that keep every recorded field."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_tensors
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset

HEADER = {"parts": {"w": {"kind": "tensor", "shape": [3], "dim": 0}}, "always_train": [], "new": []}


def said_in(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["adapeft"])


def test_a_field_that_it_does_not_have_is_refused():
    with pytest.raises(TypeError, match="a choice has no bugdet"):
        Subset({"w": Whole((3,))}).described(bugdet=3)


def test_what_was_said_is_written_and_nothing_else(tmp_path):
    path = tmp_path / "subset.safetensors"
    Subset({"w": Whole((3,))}).described(value=0.5, bound=None).described(budget=3).save(path)
    said = said_in(path)
    assert {key: value for key, value in said.items() if key not in ("kind", "provenance")} == {
        **HEADER,
        **{"value": 0.5, "bound": None, "budget": 3},
    }


def test_what_another_version_says_is_kept(tmp_path):
    """The header predates the record class and has a key that is unknown to this version."""
    older = {"method": "sam", "reach": "inf", "joint_values": {"by density": 2.0}, "rule": None, "novel": [1, 2]}
    save_tensors(tmp_path / "a", "subset", {"unused": torch.zeros(1)}, {**HEADER, **older})
    loaded = Subset.load(tmp_path / "a")
    assert (loaded.choice.method, loaded.choice.reach, loaded.choice.seed) == ("sam", "inf", 0)
    loaded.save(tmp_path / "b")
    assert older.items() <= said_in(tmp_path / "b").items()
    assert Subset.load(tmp_path / "b").choice.recorded().keys() == {*older, "provenance"}


@pytest.mark.parametrize("damaged", [{"budget": "much"}, {"unreached": "w"}, {"rule": 3}, {"contents": [1]}])
def test_a_field_of_another_type_is_damage(tmp_path, damaged):
    save_tensors(tmp_path / "a", "subset", {"unused": torch.zeros(1)}, {**HEADER, **damaged})
    with pytest.raises(AdapeftError, match="damaged description of a subset"):
        Subset.load(tmp_path / "a")


def test_what_a_reader_needs():
    assert Choice(budget=3).needed("budget") == 3
    with pytest.raises(AdapeftError, match="does not record its budget"):
        Choice().needed("budget")
