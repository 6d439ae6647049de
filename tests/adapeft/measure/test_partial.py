"""Interrupted measurements resume from their partial sums bit for bit and use no others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from adapeft.errors import AdapeftError
from adapeft.measure.groups import groups_of
from adapeft.measure.measure import measure
from adapeft.measure.partial import FOLDER, PartialSums
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.registry import get_method
from adapeft.ranks import OneRank
from tests.on_ranks.statistics import passes_for, settings_for
from tests.support.tiny import make_bert

KEY = {"seed": 3, "select.always_train": ("auto",)}


class KilledError(Exception):
    """Stands for a killed process."""


def measured(case, folder=None, kill_after=None, key=KEY):
    """Return the statistics of a case and the finished batches; raise KilledError after ``kill_after`` of them."""
    model = make_bert().eval()
    settings = settings_for(case)
    groups = groups_of(model, settings)
    method = get_method(settings.method)
    shards = WholeModel(model, [info.name for info in groups.parameters], groups.always_train)
    passes = passes_for(model, shards, by_example=method.measures_examples)
    events = []

    def progress(name, done, total):
        if len(events) == kill_after:
            raise KilledError
        events.append((name, done))

    saved = PartialSums(folder, key, interval=1e-9, ranks=OneRank()) if folder else None
    return measure(method, replace(passes, saved=saved, progress=progress), groups, settings), events


def assert_same(actual, expected):
    assert actual.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(actual.columns[name], column)
    for shard, other in zip(actual.elements, expected.elements, strict=True):
        for name, column in other.columns.items():
            assert torch.equal(shard.columns[name], column)
    if expected.options is not None:
        for name, column in vars(expected.options).items():
            np.testing.assert_array_equal(getattr(actual.options, name), column)


@pytest.mark.parametrize(
    ("case", "every"),
    [
        *[("row", 4), ("element", 7), ("options", 8), ("sam", 9), ("probe", 13)],
        *[pytest.param(case, 1, marks=pytest.mark.slow) for case in ("row", "element", "options", "sam", "probe")],
    ],
)
def test_killed_after_any_batch_goes_on_to_the_same_statistics(case, every, tmp_path):
    expected, events = measured(case)
    assert len(events) > 8
    for killed in range(0, len(events), every):
        folder = tmp_path / str(killed)
        with pytest.raises(KilledError):
            measured(case, folder, kill_after=killed)
        actual, rest = measured(case, folder)
        assert_same(actual, expected)
        # No batch is measured twice, except for the probe's own steps; a resumed pass reports its progress once.
        saved = [event for event in events[:killed] if event[0] != "probe"]
        assert len(rest) == len(events) - len(saved) + sum(done == 1 for _, done in saved)


@pytest.mark.parametrize("case", ["fish", "parabola"])
def test_killed_in_the_middle(case, tmp_path):
    expected, events = measured(case)
    with pytest.raises(KilledError):
        measured(case, tmp_path, kill_after=len(events) - 2)
    actual, rest = measured(case, tmp_path)
    assert_same(actual, expected)
    assert len(rest) < len(events) / 2


def test_a_measurement_killed_twice(tmp_path):
    expected, _ = measured("row")
    for killed in (5, 4):
        with pytest.raises(KilledError):
            measured("row", tmp_path, kill_after=killed)
    assert_same(measured("row", tmp_path)[0], expected)


def test_sums_of_another_key_are_dropped(tmp_path):
    with pytest.raises(KilledError):
        measured("row", tmp_path, kill_after=8)
    other = {**KEY, "seed": 4}
    assert PartialSums(tmp_path, KEY, 1.0, OneRank()).dropped == []
    saved = PartialSums(tmp_path, other, 1.0, OneRank())
    assert saved.dropped == ["seed"]
    assert saved.begin("warm-up", [torch.zeros(1)]) == 0
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["key.json"]
    saved.remove()
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("name", ["key.json", "rank-00000-of-00001.safetensors"])
def test_damaged_sums_are_refused(name, tmp_path):
    with pytest.raises(KilledError):
        measured("row", tmp_path, kill_after=8)
    path = sorted((tmp_path / FOLDER).rglob(name))[-1]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(AdapeftError, match=name):
        measured("row", tmp_path)


def test_sums_are_saved_when_a_pass_ends_and_after_the_interval(tmp_path):
    clock = iter([0.0, 1.0, 4.0, 7.0, 13.0, 13.0, 14.0, 15.0]).__next__
    total = torch.zeros(2)
    saved = PartialSums(tmp_path, KEY, 10.0, OneRank(), clock)
    assert saved.begin("slope", [total]) == 0
    found = []
    for done in range(1, 6):
        total += 1
        saved.save("slope", done, 5, [total])
        found.append(sorted(path.name for path in (tmp_path / FOLDER).glob("0*")))
    assert found == [[], [], [], ["00-slope-00004"], ["00-slope-00005"]]


def test_nothing_is_saved_at_an_interval_of_zero(tmp_path):
    with pytest.raises(KilledError):
        measured("row", tmp_path, kill_after=8)
    saved = PartialSums(tmp_path, KEY, 0.0, OneRank())
    assert saved.begin("warm-up", [torch.zeros(1)]) == 0
    saved.save("warm-up", 1, 1, [torch.zeros(1)])
    assert not (tmp_path / FOLDER).exists()


def test_what_a_kill_while_saving_leaves_is_not_taken_for_sums(tmp_path):
    with pytest.raises(KilledError):
        measured("row", tmp_path, kill_after=8)
    newest = max((tmp_path / FOLDER).glob("[0-9]*"))
    newest.rename(newest.with_name(f".{newest.name}.partial"))
    (newest.with_name(f".{newest.name}.partial") / "rank-00001-of-00002.safetensors").write_bytes(b"half")
    assert_same(measured("row", tmp_path)[0], measured("row")[0])
