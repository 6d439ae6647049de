"""A worker is killed while it measures: the command ends with the cause, and again goes on to the same subset."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import psutil
import pytest

from adapeft.artifact import load_table, load_tensors
from adapeft.measure.partial import FOLDER
from tests.cluster.checkpoints import COMMAND, adapeft, write_bert, write_colours, write_config

OVERRIDES = ["select.batch_size=2", "warmup_steps=10", "cluster.save_interval=0.01"]


def counts(output: str, step: str) -> list[tuple[int, int]]:
    """``done/total`` of a step's lines."""
    return [(int(done), int(total)) for done, total in re.findall(rf"^measure: {step} (\d+)/(\d+)$", output, re.M)]


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "TrainWorker" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_killed_worker_costs_no_batch(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    command = [str(COMMAND), "select", str(config), *OVERRIDES]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "80"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("measure: slope"):
            os.kill(workers_of(process)[-1].pid, signal.SIGKILL)
            break
    rest, _ = process.communicate(timeout=300)
    output = "".join(lines) + rest
    assert process.returncode == 1, output
    assert "a worker failed" in rest, output
    assert "goes on from what was saved" in rest, output
    assert (tmp_path / "run" / FOLDER).is_dir()

    again = adapeft("select", config, *OVERRIDES)
    assert again.returncode == 0, again.stdout + again.stderr
    assert counts(again.stdout, "warm-up")[0] == (10, 10)
    assert counts(again.stdout, "direction")[0] == (40, 40)
    done, total = counts(again.stdout, "slope")[0]
    assert 1 <= done <= total == 40
    assert not (tmp_path / "run" / FOLDER).exists()

    other = tmp_path / "undisturbed"
    undisturbed = adapeft("select", config, *OVERRIDES, f"output={other}")
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    assert load_table(tmp_path / "run" / "groups.parquet").equals(load_table(other / "groups.parquet"))
    subsets = [load_tensors(folder / "subset.safetensors", "subset")[0] for folder in (tmp_path / "run", other)]
    assert subsets[0].keys() == subsets[1].keys()
    assert all(subsets[0][name].equal(subsets[1][name]) for name in subsets[0])
