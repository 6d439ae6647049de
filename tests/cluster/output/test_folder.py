"""Claiming the folder of a run, and refusing the folder of another."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from adapeft.config.config import Config
from adapeft.config.load import load_config, parse_config
from adapeft.errors import AdapeftError
from adapeft.sections.cluster import Cluster
from cluster.output.folder import RunFolder


def config_for(folder, **select):
    return parse_config(
        {
            "model": {"name": "base", "task": "causal-lm"},
            "data": {"train": "a.txt", "evaluation": "b.txt"},
            "output": str(folder),
            "select": select,
        }
    ).resolved()


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def test_a_new_folder_gets_the_whole_config(folder):
    config = config_for(folder.path)
    folder.claim(config)
    assert load_config(folder.config).select == config.select
    folder.claim(config)


def test_a_run_that_measured_nothing_gives_way(folder):
    folder.claim(config_for(folder.path, budget="90%"))
    (folder.logs / "measure-rank-0.log").write_text("it failed")
    folder.claim(config_for(folder.path, budget="1%"))
    assert str(load_config(folder.config).select.budget) == "1%"


def test_results_are_kept(folder):
    folder.claim(config_for(folder.path, budget="2%"))
    folder.table.write_text("measured")
    folder.claim(config_for(folder.path, budget="2%"))
    with pytest.raises(AdapeftError, match=r"(?s)holds another run:\n  select.budget: 1% here, 2% there.*output=…"):
        folder.claim(config_for(folder.path, budget="1%"))
    assert str(load_config(folder.config).select.budget) == "2%"


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "model.safetensors"])
def test_what_is_somebody_elses_is_not_touched(folder, name):
    folder.path.mkdir()
    (folder.path / name).write_text("mine")
    message = rf"holds files that do not belong to a run \({name} …\). Give a new or empty folder"
    with pytest.raises(AdapeftError, match=message):
        folder.claim(config_for(folder.path))
    assert [path.name for path in folder.path.iterdir()] == [name]


def test_data_may_be_there(folder):
    (folder.path / "data").mkdir(parents=True)
    folder.claim(config_for(folder.path))


@pytest.mark.parametrize("obstacle", ["file", "dangling link"])
def test_a_folder_that_cannot_be_made(tmp_path, obstacle):
    place = tmp_path / "place"
    if obstacle == "file":
        place.write_text("")
        place = place / "run"
    else:
        place.symlink_to(tmp_path / "nowhere" / "run")
    with pytest.raises(AdapeftError, match=rf"output = {place}: cannot be created .*Give a folder on writable storage"):
        RunFolder(place).claim(config_for(place))


@pytest.mark.parametrize("name", ["a" * 300, "/".join(["a" * 200] * 30), "a\0b", "loop/run"])
@pytest.mark.parametrize("key", ["output", "data.train", "select.statistics", "train.subset"])
def test_a_path_that_no_file_can_have(tmp_path, key, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = str(tmp_path / f"{name}{'.txt' * (key == 'data.train')}")
    tree = {
        "model": {"name": "base", "task": "causal-lm"},
        "data": {"train": "a.txt", "evaluation": "b.txt"},
        "output": str(tmp_path / "run"),
        "select": {},
        "train": {},
    }
    section, _, last = key.rpartition(".")
    (tree[section] if section else tree)[last] = path
    with pytest.raises(AdapeftError, match=rf"{key} = .*: is not a valid path \(.*\). Give another one"):
        parse_config(tree).resolved()


def test_a_file_is_no_folder(folder):
    folder.path.write_text("")
    with pytest.raises(AdapeftError, match=r"output = .*run is a file\. Give a folder\."):
        folder.claim(config_for(folder.path))


def test_other_machines_take_a_run_up(folder):
    config = config_for(folder.path)
    folder.claim(config)
    folder.checkpoints.mkdir()
    folder.claim(config.model_copy(update={"cluster": Cluster(workers=3, zero_stage=1)}))
    assert load_config(folder.config).cluster == Cluster(workers=3, zero_stage=1)


def test_one_command_at_a_time(folder):
    config = config_for(folder.path)
    lock = folder.claim(config)
    with pytest.raises(AdapeftError, match=r"output = .*run: another adapeft command is writing there\. Wait until"):
        folder.claim(config)
    lock.release()
    folder.claim(config).release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_where_no_lock_can_be_had_nobody_is_kept_out(folder, monkeypatch, number):
    """Storage without locks, and finished runs that are read-only."""
    config = config_for(folder.path)
    folder.claim(config).release()
    folder.table.write_text("measured")

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    lock = folder.claim(config)
    folder.claim(config).release()
    lock.release()


def test_a_dead_process_holds_nothing(folder):
    """The process is killed, so it cannot release its lock."""
    program = f"""
import signal
from pathlib import Path
from cluster.output.lock import hold
lock = hold(Path({str(folder.path)!r}))
print("held", flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(AdapeftError, match="another adapeft command"):
            folder.claim(config_for(folder.path))
        assert not folder.config.exists(), "who is refused writes nothing"
        process.kill()
    folder.claim(config_for(folder.path)).release()


CONTENTS = {"data.train": "a" * 32, "data.evaluation": "b" * 32, "model.name": "c" * 32}


def finished(folder: RunFolder, config: Config) -> None:
    folder.claim(config, CONTENTS).release()
    folder.subset.touch()


def test_the_same_contents_are_taken_up(folder):
    config = config_for(folder.path)
    finished(folder, config)
    folder.claim(config, CONTENTS).release()
    folder.check_is_of(config, CONTENTS)
    assert folder.contents() == CONTENTS


@pytest.mark.parametrize("key", CONTENTS)
def test_results_of_other_contents_are_refused_by_place(folder, key):
    config = config_for(folder.path)
    finished(folder, config)
    changed = {**CONTENTS, key: "d" * 32}
    for check in (folder.claim, folder.check_is_of):
        with pytest.raises(AdapeftError, match=rf"{key} = .*: content dddddddddddd now, {CONTENTS[key][:12]} then"):
            check(config, changed)
    folder.claim(config, CONTENTS).release()


def test_results_that_do_not_say_of_what_are_refused(folder):
    config = config_for(folder.path)
    finished(folder, config)
    folder.contents_path.unlink()
    with pytest.raises(AdapeftError, match=r"data.train = .*: content aaaaaaaaaaaa now, not recorded then"):
        folder.claim(config, CONTENTS)


def test_a_run_without_results_takes_the_new_contents(folder):
    config = config_for(folder.path)
    folder.claim(config, CONTENTS).release()
    changed = {**CONTENTS, "data.train": "d" * 32}
    folder.claim(config, changed).release()
    assert folder.contents() == changed


def interrupted(folder: RunFolder, config: Config) -> None:
    """Write the folder of a run that died during training."""
    folder.claim(config, CONTENTS).release()
    (folder.checkpoints / "step-10").mkdir(parents=True)


@pytest.mark.parametrize("key", CONTENTS)
def test_no_training_is_resumed_on_other_inputs(folder, key):
    config = config_for(folder.path)
    interrupted(folder, config)
    with pytest.raises(AdapeftError, match=rf"{key} = .*: content dddddddddddd now, {CONTENTS[key][:12]} then"):
        folder.claim(config, {**CONTENTS, key: "d" * 32})
    assert (folder.checkpoints / "step-10").is_dir()
    folder.claim(config, CONTENTS).release()


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 5e-3), ("epochs", 4.0), ("batch_size", 8), ("weight_decay", 0.0), ("max_grad_norm", None)],
)
def test_no_training_is_resumed_under_other_settings(folder, key, value):
    config = config_for(folder.path)
    interrupted(folder, config)
    other = config.model_copy(update={"train": config.train.model_copy(update={key: value})})
    with pytest.raises(AdapeftError, match=rf"holds another run:\n  train.{key}: .* here, .* there\nGive another"):
        folder.claim(other, CONTENTS)
    assert load_config(folder.config) == config
