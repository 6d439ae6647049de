"""Machines that share only a URL: each works in a copy of the run folder; results equal those of one machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from adapeft.files.artifact import load_table, load_tensors
from adapeft.files.rank_files import rank_paths
from cluster.launch.copies import run_copy
from cluster.output.folder import RunFolder
from cluster.output.mirror import Mirror
from cluster.zero.compiled import extensions_folder
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks

SETTINGS = [
    *("cluster.workers=2", "zero_stage=2", "groups=element", "calibration=48", "warmup_steps=4"),
    *("max_steps=12", "save_steps=4", "eval_steps=6", "logging_steps=1", "learning_rate=1e-2"),
]


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """The folder of the launching machine, on which no rank runs."""
    # The machines share the operation compiled by DeepSpeed: compiling it for each took both cores over a minute.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "launcher"))
    return tmp_path


def put(url: str, config: Path) -> RunFolder:
    """Prepare the folder and upload it, as the launching process does before a stage."""
    given = load_config(config, [*SETTINGS, f"output={url}"])
    folder = RunFolder.of(given)
    mirror = Mirror(url)
    mirror.fetch()
    folder.claim(given)
    (folder.logs / ".mark").touch()
    mirror.put()
    return folder


@pytest.mark.slow
def test_stages_move_between_machines(config, launcher):
    one, two = f"{launcher}/one", f"{launcher}/two"
    alone, url = launcher / "alone", f"file://{launcher}/storage/run"

    RunFolder(alone).claim(load_config(config, [*SETTINGS, f"output={alone}"]))
    (alone / "logs" / ".mark").touch()
    run_on_ranks(2, "tests.on_ranks.copies", f"{one},{two}", "measure,train", 0, config, *SETTINGS, f"output={alone}")

    put(url, config)
    run_on_ranks(2, "tests.on_ranks.copies", f"{one},{two}", "measure,train", 6, config, *SETTINGS, f"output={url}")
    folder = put(url, config)
    assert load_tensors(folder.delta, "delta")[1]["step"] == 6
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-4"]
    assert len(rank_paths(folder.checkpoints / "step-4", "")) == 2

    for name in ("one", "two"):  # as on a machine that was lost before it had uploaded its files
        (copied,) = (launcher / name).glob("adapeft/runs/*")
        shutil.copytree(folder.checkpoints / "step-4", copied / "checkpoints" / "step-11")
    # The first rank is now on the other machine, where the second rank wrote its part of the checkpoint.
    run_on_ranks(2, "tests.on_ranks.copies", f"{two},{one}", "train", 0, config, *SETTINGS, f"output={url}")
    put(url, config)
    assert load_table(folder.table).equals(load_table(alone / "groups.parquet"))
    for mine, other in zip(
        rank_paths(folder.path / "statistics", ""), rank_paths(alone / "statistics", ""), strict=True
    ):
        assert_same(mine, other, "shard of statistics")
    assert_same(folder.subset, alone / "subset.safetensors", "subset")
    assert_same(folder.delta, alone / "delta.safetensors", "delta")
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-12"]
    logs = {path.name: path.read_text() for path in folder.logs.glob("*.log")}
    assert logs == {
        "measure-rank-0.log": one,
        "measure-rank-1.log": two,
        "train-rank-0.log": two,
        "train-rank-1.log": one,
    }
    assert not [path for name in ("one", "two") for path in (launcher / name).rglob(".mark")]


def assert_same(mine: Path, other: Path, kind: str) -> None:
    tensors, others = (load_tensors(path, kind)[0] for path in (mine, other))
    assert tensors.keys() == others.keys()
    assert all(tensors[name].equal(others[name]) for name in tensors)


def test_a_folder_that_is_not_seen(config, tmp_path):
    given = load_config(config, [f"output={tmp_path / 'run'}"])
    said = "is not visible on .* storage that all machines share, or to a URL"
    with pytest.raises(AdapeftError, match=said), run_copy(given, ".mark", "here", puts=True):
        pass
