"""Every task measures and trains the same at every ZeRO stage, with one, two and three workers."""

from __future__ import annotations

import json

import pytest

from adapeft.subset.subset import Subset
from adapeft.tasks.registry import TASKS
from tests.on_ranks.tasks import STAGES, write_configs
from tests.support.ranks import run_on_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

WORKERS = (1, 2, 3)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs by number of workers, whose processes run all tasks at all stages."""
    configs = write_configs(tmp_path_factory.mktemp("tasks"))
    assert configs.keys() == TASKS.keys()
    found = {}
    for workers in WORKERS:
        found[workers] = tmp_path_factory.mktemp(f"workers-{workers}")
        run_on_ranks(
            workers, "tests.on_ranks.tasks", found[workers], *(f"{task}={path}" for task, path in configs.items())
        )
    return found


@pytest.mark.parametrize("task", TASKS)
def test_every_stage_and_number_of_workers_does_the_same(outputs, task):
    """Examples differ in length, so workers that averaged means of their own tokens would train something else."""
    results, values = {}, {}
    for workers, out in outputs.items():
        for stage in STAGES:
            folder = out / f"{task}-{stage}"
            assert not list(folder.glob("error-*")), [path.read_text() for path in folder.glob("error-*")]
            results[workers, stage] = json.loads((folder / "result.json").read_text())
            values[workers, stage] = Subset.load(folder / "subset.safetensors").choice.value
    first = results[1, 0]
    assert first["after"]["loss"] != pytest.approx(first["before"]["loss"], rel=1e-3), "nothing was trained"
    for where, result in results.items():
        assert result["before"]["loss"] == pytest.approx(first["before"]["loss"], rel=1e-5), where
        assert values[where] == pytest.approx(values[1, 0], rel=1e-5), where
        assert result["after"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-4), where
