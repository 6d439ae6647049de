"""A comparison whose runs have one worker each, like the published benchmarks."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.support.checkpoints import COMMAND, write_bert, write_colours, write_config

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_runs_of_one_worker_work_with_several_threads(tmp_path):
    """The second run reads the statistics of the first with OpenMP threads, before it forks its own workers.

    Below 65,536 weights, torch computes a fingerprint in one thread.
    """
    base = write_bert(tmp_path / "base", intermediate_size=4096)
    config = write_config(tmp_path / "run.yaml", base, *write_colours(tmp_path, 96, 48))
    overrides = ["cluster.workers=1", "cluster.zero_stage=0", "train.epochs=1", "select.calibration=32"]
    done = subprocess.run(
        [str(COMMAND), "compare", str(config), *overrides, "methods=[adapeft:element]",
         "budgets=[5%,10%]", "seeds=[0]"],
        env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "run 2/2: adapeft:element, 10%, seed 0, learning rate 0.05: accuracy" in done.stdout
