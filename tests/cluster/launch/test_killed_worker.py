"""After workers are killed, the command or the next one reaches the results of an uninterrupted run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from adapeft.files.artifact import load_table, load_tensors
from adapeft.measure.partial import FOLDER
from tests.support.checkpoints import COMMAND, WITHOUT_DROPOUT, adapeft, write_bert, write_colours, write_config

pytestmark = pytest.mark.ray

OVERRIDES = ["select.batch_size=2", "warmup_steps=10", "cluster.save_interval=0.01"]


def counts(output: str, step: str) -> list[tuple[int, int]]:
    """Return ``done/total`` of all progress lines of a step."""
    return [(int(done), int(total)) for done, total in re.findall(rf"^measure: {step} (\d+)/(\d+)$", output, re.M)]


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "TrainWorker" in " ".join(child.cmdline())]


def killing(arguments: list[str], *moments: str) -> tuple[int, str]:
    """Run the command, kill a worker at the first line with each prefix in turn, and return status and output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "80"}
    process = subprocess.Popen(
        [str(COMMAND), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    waiting, lines = list(moments), []
    for line in process.stdout:
        lines.append(line)
        if waiting and line.startswith(waiting[0]):
            del waiting[0]
            os.kill(workers_of(process)[-1].pid, signal.SIGKILL)
    assert not waiting, "".join(lines)
    return process.wait(timeout=900), "".join(lines)


def assert_same_tensors(kind: str, folders: list[Path]) -> None:
    tensors = [load_tensors(folder / f"{kind}.safetensors", kind)[0] for folder in folders]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])


@pytest.mark.slow
def test_a_killed_worker_costs_no_batch(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    status, output = killing(["select", str(config), *OVERRIDES], "measure: slope")
    assert status == 1, output
    assert "a worker failed" in output, output
    assert "again to resume from what was saved" in output, output
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
    assert_same_tensors("subset", [tmp_path / "run", other])


@pytest.mark.slow
def test_killed_workers_are_replaced_while_the_command_runs(tmp_path):
    base = write_bert(tmp_path / "base", **WITHOUT_DROPOUT)
    config = write_config(tmp_path / "run.yaml", base, *write_colours(tmp_path))
    overrides = [*OVERRIDES, "train.save_steps=2", "train.eval_steps=5", "train.epochs=20"]
    status, output = killing(
        ["run", str(config), *overrides, "cluster.max_failures=2"], "measure: slope", "train: step 10"
    )
    assert status == 0, output
    assert output.count("again to resume from what was saved") == 2, output
    assert "measure: retrying with new workers, up to 2 times" in output
    assert "train: retrying with new workers, up to 2 times" in output
    other = tmp_path / "undisturbed"
    undisturbed = adapeft("run", config, *overrides, f"output={other}")
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    for kind in ("subset", "delta"):
        assert_same_tensors(kind, [tmp_path / "run", other])
