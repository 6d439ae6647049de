"""A run whose choice is empty exits with status 2 and the reason before workers start, also when repeated."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import yaml

from adapeft.config.experiments import Contender
from adapeft.config.load import load_config
from adapeft.config.write import to_yaml
from adapeft.measure.statistics import Statistics
from adapeft.ranks import OneRank
from adapeft.sections.budget import Budget
from adapeft.subset.subset import Subset
from cluster.commands.compare.machines.apart import run_apart
from cluster.commands.compare.output.row import rows_of
from cluster.commands.compare.output.table import cells_of, table
from cluster.commands.compare.run import Run
from cluster.inspection.inspect import inspect
from cluster.output.contents import contents_of
from cluster.ranks.measure import choose_and_save
from tests.support.checkpoints import write_bert, write_classifier, write_colours, write_config


@pytest.fixture
def uphill(tmp_path):
    """Return a config, and the folder of a run with only negative slopes; the base has a trained head."""
    path = _by_row(tmp_path, write_classifier(tmp_path / "base", 3))
    return path, _measured(path, tmp_path / "measured")


def _by_row(folder, model):
    path = write_config(folder / "run.yaml", model, *write_colours(folder))
    content = yaml.safe_load(path.read_text())
    content["select"]["groups"] = "row"
    path.write_text(yaml.safe_dump(content))
    return path


def _measured(path, folder):
    config = load_config(path, [f"output={folder}"]).resolved()
    inspection = inspect(config)
    groups, contents = inspection.groups, contents_of(config, inspection.description)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    columns = {"slope": np.full(groups.num_groups, -1.0), "curvature": np.ones(groups.num_groups)}
    choose_and_save(config, contents, Statistics(groups, columns), 160, OneRank(), None)
    return folder


@pytest.fixture
def without_workers(monkeypatch):
    def must_not_be_called(*_, **__):
        raise AssertionError("workers start for a choice of nothing")

    monkeypatch.setattr(ray, "init", must_not_be_called)


def test_every_command_refuses_and_repeats_it(command, uphill, tmp_path, without_workers):
    path, measured = uphill
    mine = [path, f"select.statistics={measured}", f"output={tmp_path / 'out'}"]
    for name in ("select", "select", "run", "run", "train"):
        done = command(name, *mine)
        assert done.returncode == 2, (name, done)
        message = " ".join(done.stderr.split())
        assert "error nothing to train: adapeft chose nothing, because none of the" in message
        assert "select.if_empty: random" in message
    assert not (tmp_path / "out" / "delta.safetensors").exists()
    saved = tmp_path / "out" / "subset.safetensors"
    done = command("run", path, f"train.subset={saved}", f"output={tmp_path / 'other'}")
    assert done.returncode == 2
    assert "nothing to train" in done.stderr


def test_a_random_draw_where_the_config_asks_for_it(command, uphill, tmp_path, without_workers):
    path, measured = uphill
    output = tmp_path / "drawn"
    mine = [path, f"select.statistics={measured}", f"output={output}", "select.if_empty=random"]
    for _ in range(2):
        done = command("select", *mine)
        assert done.returncode == 0, done.stderr
        assert "no candidate promises a lower loss, so a random draw of the same budget is trained" in " ".join(
            done.stdout.split()
        )
    subset = Subset.load(output / "subset.safetensors")
    assert 0 < subset.count <= subset.choice.budget
    assert subset.choice.drawn_for_empty_choice is True


def test_a_head_alone_is_announced(command, tmp_path, without_workers):
    path = _by_row(tmp_path, write_bert(tmp_path / "base"))
    measured = _measured(path, tmp_path / "measured")
    done = command("select", path, f"select.statistics={measured}", f"output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "only the parameters of select.always_train are trained (classifier.weight, classifier.bias)" in " ".join(
        done.stdout.split()
    )


def test_transfer_refuses(command, uphill, tmp_path):
    _, measured = uphill
    arguments = ["transfer", "--from", measured, "--to", tmp_path / "base", f"output={tmp_path / 'target'}"]
    done = command(*arguments)
    assert done.returncode == 2
    assert "nothing to train: adapeft chose nothing" in done.stderr
    assert not (tmp_path / "target" / "subset.safetensors").exists()
    done = command(*arguments, "select.if_empty=random")
    assert done.returncode == 0, done.stderr
    assert Subset.load(tmp_path / "target" / "subset.safetensors").count > 0


def test_a_row_of_a_comparison_says_so(uphill, tmp_path):
    path, measured = uphill
    config = load_config(path, [f"select.statistics={measured}", f"output={tmp_path / 'compared'}"]).resolved()

    def refused(settings, log):
        log.write_text("choosing\nerror nothing to train: adapeft chose nothing, because none of 5 …\n")
        return 2

    metrics, failure = run_apart(config, refused)
    assert metrics is None
    runs = [Run(Contender("adapeft", "auto"), Budget.parse("1%"), 0, tmp_path, 1e-3, None, failure)]
    assert "| adapeft | 1% | nothing to train |" in table(*cells_of(rows_of(runs), "accuracy", True, None))
