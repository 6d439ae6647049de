"""Run folders from before methods had their own options: one section for all methods, rules under one key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from adapeft.config.config import Config
from adapeft.config.keys import KEYS, differences, differing, field_of, flatten, measurement_key
from adapeft.config.load import load_config, parse_select
from adapeft.config.write import to_yaml
from adapeft.errors import AdapeftError
from adapeft.sections.section import is_harmless
from tests.adapeft.config.test_config import MINIMAL

RUNS = json.loads((Path(__file__).parent / "old_runs.json").read_text(encoding="utf-8"))
"""``config.yaml`` and the measurement key as that version wrote them, with the overrides that produced them."""


@pytest.fixture(params=RUNS)
def old(request, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(RUNS[request.param]["config"], encoding="utf-8")
    return load_config(path), RUNS[request.param]["key"], RUNS[request.param]["overrides"]


def test_they_load_as_what_they_said(old, tmp_path):
    config, _, overrides = old
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    method = config.select.method
    # Methods other than adapeft accepted and ignored these options; now they reject them.
    mine = [one for one in overrides if method == "adapeft" or not one.startswith(("direction", "shrinkage"))]
    # Their default learning rate was a number.
    again = load_config(path, ["train.learning_rate=1e-3", *mine, "output=/runs/cola"])
    assert config == again
    assert differences(config, again) == []


def test_each_option_has_the_value_that_the_file_has(old):
    config, _, overrides = old
    text = next(run["config"] for run in RUNS.values() if run["overrides"] == overrides)
    said = yaml.safe_load(text)["select"]
    said |= said.pop("rule")
    for key, value in config.select.model_dump(mode="json").items():
        default = type(config.select).model_fields[key].default
        assert value == said.get(key, default), key


def test_what_they_measured_need_not_be_measured_again(old):
    config, key, _ = old
    # By default they measured rows.
    select = config.select.model_copy(update={"groups": key["select.groups"]})
    wanted = measurement_key(config.model_copy(update={"select": select}))
    assert differing(wanted, {name: key.get(name) for name in wanted}) == []
    assert wanted.keys() <= key.keys()
    # The other keys are options of other methods, at their defaults.
    assert all(name not in KEYS or name.startswith("select.") for name in key.keys() - wanted.keys())


def test_what_is_written_now_loads_as_the_same(old, tmp_path):
    config, _, _ = old
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_a_key_that_nobody_has_marked_is_part_of_what_was_measured(monkeypatch):
    config = Config.model_validate(yaml.safe_load(MINIMAL))
    harmless = {key for key in flatten(config) if is_harmless(field_of(key, "adapeft"))}
    assert not harmless & measurement_key(config).keys()
    assert flatten(config).keys() - harmless == measurement_key(config).keys()
    for key in harmless:
        with monkeypatch.context() as patch:
            patch.setattr(field_of(key, "adapeft"), "metadata", [])
            assert key in measurement_key(config), key


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "sam", "placement": "houlsby"}, "select.placement = houlsby: is an option of method adapter, and "),
        ({"method": "sam", "joint": False}, "select.joint = false: is an option of method adapeft, and select.method"),
        ({"method": "lora", "probability": 0.5}, "the methods mixout, mixout-reset and child-tuning-f, and select"),
        ({"placement": "houlsby"}, "and select.method is adapeft. Leave it out, or set select.method: adapter."),
        ({"method": "mixout", "rule": {"budget": 3}}, "select.rule: budget = 3 is an option of all methods"),
        ({"method": "mixout", "probability": 0.5, "rule": {"probability": 0.6}}, "given a second time as select.prob"),
        ({"method": "mixout", "rule": {"probability": 2}}, "select.probability = 2: should be less than 1"),
        ({"method": "mixuot"}, "select.method = mixuot: should be 'full', 'random', .*Did you mean 'mixout'"),
        ({"method": 3}, "select.method = 3: should be 'full', "),
        ({"method": "sam", "placment": "houlsby"}, "select.placment: unknown key. Did you mean 'select.placement'"),
    ],
)
def test_refused(given, said):
    with pytest.raises(AdapeftError, match=said):
        parse_select(given)


def test_all_wrong_keys_are_named_at_once():
    with pytest.raises(AdapeftError) as caught:
        parse_select({"method": "sam", "placement": "houlsby", "calibration": 1, "bugdet": 1})
    assert [line.partition(" ")[0] for line in str(caught.value).splitlines()] == [
        "select.calibration",
        "select.placement",
        "select.bugdet:",
    ]


def test_a_default_of_another_method_says_nothing():
    assert parse_select({"method": "sam", "direction": "adam", "lora_ranks": [1, 2, 4, 8, 16]}).own().keys() == {
        "scope",
        "solver",
        "if_empty",
    }
