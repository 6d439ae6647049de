"""Measuring on ranks without Ray: stopped and resumed, at any ZeRO stage."""

from __future__ import annotations

import json

import pytest

from adapeft.files.artifact import load_table, load_tensors
from adapeft.measure.partial import FOLDER
from tests.on_ranks.measure import CHOOSING, RUNS
from tests.support.checkpoints import write_bert, write_colours, write_config
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure")
    config = write_config(folder / "run.yaml", write_bert(folder / "base"), *write_colours(folder))
    run_on_ranks(2, "tests.on_ranks.measure", config, folder)
    return folder


@pytest.mark.parametrize("tag", RUNS)
def test_a_stopped_measurement_resumes_to_the_same_bits(runs, tag):
    whole, first, second = json.loads((runs / f"{tag}.json").read_text())
    saved = [event for event in first if event[0] != "probe"]
    assert len(second) == len(whole) - len(saved) + sum(done == 1 for _, done in saved), "a batch was measured twice"

    folders = [runs / f"{tag}-{name}" for name in ("undisturbed", "stopped")]
    tables = [load_table(folder / "groups.parquet") for folder in folders]
    assert tables[0].equals(tables[1])
    subsets = [load_tensors(folder / "subset.safetensors", "subset")[0] for folder in folders]
    assert subsets[0].keys() == subsets[1].keys()
    assert all(subsets[0][name].equal(subsets[1][name]) for name in subsets[0])
    for path in (folders[0] / "statistics").glob("*"):
        tensors = [load_tensors(folder / "statistics" / path.name, "shard of statistics")[0] for folder in folders]
        assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])
    assert not (folders[1] / FOLDER).exists()


def test_the_reported_peak_is_that_of_the_largest_rank_and_includes_choosing(runs):
    before, reported = json.loads((runs / "peaks.json").read_text())
    assert reported - before > CHOOSING / 2
