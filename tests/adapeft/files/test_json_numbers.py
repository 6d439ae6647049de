"""Output is valid JSON for any reader: infinities read back unchanged, and NaN is rejected with its key."""

from __future__ import annotations

import json
import math

import pytest
import torch

from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_tensors, save_json, save_tensors
from adapeft.files.damage import load_json
from adapeft.files.json_numbers import decoded, dumps, loads, undefined_as_null
from adapeft.subset.entry import Summary

TREE = {
    "reach": math.inf,
    "scores": [{"loss": 1.5, "perplexity": math.inf}, {"gain": -math.inf}],
    "name": "run",
    "n": 3,
}


def strict(text: str):
    return json.loads(text, parse_constant=pytest.fail)


def test_infinities_read_back():
    assert strict(dumps(TREE))["scores"][1] == {"gain": "-inf"}
    assert decoded(loads(dumps(TREE))) == TREE


def test_a_nan_is_refused_by_its_key(tmp_path):
    content = {"after": {"scores": [1.0, {"loss": math.nan}]}}
    with pytest.raises(AdapeftError, match=r"after\.scores\[1\]\.loss = nan: this is not a number"):
        save_json(tmp_path / "metrics.json", content)
    with pytest.raises(AdapeftError, match=r"after\.scores\[1\]\.loss = nan"):
        save_tensors(tmp_path / "delta.safetensors", "delta", {"x": torch.ones(1)}, content)
    assert not list(tmp_path.iterdir())


def test_headers_hold_infinities_and_stay_json(tmp_path):
    path = tmp_path / "delta.safetensors"
    save_tensors(path, "delta", {"x": torch.ones(1)}, {"scores": {"perplexity": math.inf}})
    assert load_tensors(path, "delta")[1]["scores"] == {"perplexity": "inf"}


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_json_is_not_read(tmp_path, constant):
    path = tmp_path / "metrics.json"
    path.write_text(f'{{"loss": {constant}}}')
    with pytest.raises(AdapeftError, match=rf"metrics\.json is not what a run writes.*{constant} is not JSON"):
        load_json(path, "what a run writes", "Run again.")


def test_quantities_that_are_undefined_become_null():
    assert undefined_as_null({"correlation": [math.nan, 0.5], "gain": (-math.inf,)}) == {
        "correlation": [None, 0.5],
        "gain": [-math.inf],
    }


def test_a_store_entry_keeps_an_infinite_perplexity():
    summary = Summary(count=3, after={"loss": 800.0, "perplexity": math.inf})
    assert strict(summary.model_dump_json())["after"]["perplexity"] == "inf"
    assert Summary.model_validate_json(summary.model_dump_json()) == summary


@pytest.mark.parametrize("said", [{"value": math.nan}, {"bound": math.inf}, {"after": {"loss": math.nan}}])
def test_a_store_entry_refuses_what_is_no_result(said):
    with pytest.raises(ValueError, match=r"finite|nan is not a number"):
        Summary(count=3, **said)
