"""``adapeft validate``: its figures, refused input, and equal results for any number of ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from adapeft.config.experiments import Trials
from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from adapeft.methods.adapeft import options
from adapeft.ranks import OneRank
from cluster.output.folder import RunFolder
from cluster.output.validation import load_validation, save_validation
from cluster.ranks import validate
from tests.support.checkpoints import adapeft

pytestmark = pytest.mark.ray

TRIALS = {"subsets": 2, "sizes": (0.1, 0.5), "singles": 3, "steps": (2, 6), "held_out": 41}


class Alone(OneRank):
    """A single rank, on the GPU if the machine has one."""

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def all_gather_object(self, value):
        return [value]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """Return the validation of a single rank."""
    trials = Trials.model_validate(TRIALS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "join", Alone)
        result = validate.validate_on_rank(load_config(config), lambda event: None, trials)
    assert Alone.device.type == "cpu" or torch.cuda.max_memory_allocated(), "the model belongs on the GPU"
    path = tmp_path_factory.mktemp("alone") / "validation.json"
    save_validation(path, result, trials)
    return load_validation(path, trials)


def test_figures_are_of_what_was_trained(alone):
    sizes = np.array([draw["size"] for draw in alone["draws"]])
    assert sorted(sizes.tolist()) == [0.0, 0.0, 0.0, 0.1, 0.1, 0.5, 0.5]
    assert [(one["learning_rate"], one["steps"]) for one in alone["settings"]] == [
        (3e-4, 2),
        (3e-4, 6),
        (1e-3, 2),
        (1e-3, 6),
    ]
    counts = np.array([draw["count"] for draw in alone["draws"]])
    for setting in alone["settings"]:
        decreases = np.array(setting["decreases"])
        assert np.ptp(decreases) > 0
        assert setting["overshooting"] == np.mean(decreases < 0)
        count = setting["correlations"]["count"]
        assert count["all"] == pytest.approx(spearmanr(counts, decreases).statistic)
        assert count["single tensors"] == pytest.approx(spearmanr(counts[sizes == 0], decreases[sizes == 0]).statistic)
        assert count["0.1"] is None, "two draws have no correlation"
        for name, predicted in setting["predictions"].items():
            found = setting["correlations"][name]["all"]
            assert found == pytest.approx(spearmanr(predicted, decreases).statistic), name
        assert set(setting["at_fitted_reach"]) == {name for name in setting["correlations"] if "influence (" in name}
        best = [value["all"] for value in setting["correlations"].values()]
        assert best == sorted(best, reverse=True)


@pytest.mark.slow
def test_two_workers_find_what_one_does(config, alone, tmp_path):
    trials = [f"{name}={json.dumps(value)}" for name, value in TRIALS.items()]
    command = ("validate", config, *trials, f"output={tmp_path / 'out'}")
    done = adapeft(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learning rate 0.001, 6 steps" in done.stdout
    assert "of the subsets raised the loss instead of lowering it" in done.stdout
    assert "all figures: " in done.stdout
    found = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert found["settings"] == alone["settings"]
    assert found["draws"] == alone["draws"]
    again = adapeft(*command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "validation: already done" in again.stdout
    assert again.stdout.partition("learning rate")[2] == done.stdout.partition("learning rate")[2]
    assert adapeft(*command, "subsets=3").returncode == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("groups=role", "select.groups = role: validate draws groups within single tensors"),
        ("measure=low-rank", "select.measure = low-rank: validate compares estimators that need the gradients of"),
        ("dtype=bfloat16", "model.dtype = bfloat16: the small steps of validate would be lost to rounding"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_anything_is_written(config, command, tmp_path, override, said):
    status, _, errors = command("validate", config, override, f"output={tmp_path / 'out'}")
    assert status == 2
    assert said in " ".join(errors.split())
    assert not (tmp_path / "out").exists()


def test_a_model_that_auto_measures_with_low_rank_is_refused_before_workers_start(
    config, command, tmp_path, monkeypatch
):
    monkeypatch.setattr(options, "_SMALL", 0)
    status, _, errors = command("validate", config, f"output={tmp_path / 'out'}")
    assert status == 2
    said = " ".join(errors.split())
    assert "select.measure = low-rank, for a model of" in said
    assert "Set select.measure: exact if the memory suffices" in said


def test_a_method_that_measures_nothing_is_refused(config, command, tmp_path):
    status, _, errors = command("validate", config, "select.method=random", f"output={tmp_path / 'out'}")
    assert status == 2
    assert "select.method = random: it does not measure the loss, which validate predicts." in " ".join(errors.split())


def test_what_is_there_is_kept(alone, config, tmp_path):
    """Results of other trials or another config are refused; a run of the same config may use the folder."""
    loaded = load_config(config, [f"output={tmp_path / 'out'}"])
    folder = RunFolder.of(loaded)
    folder.claim(loaded).release()
    trials = Trials.model_validate(TRIALS)
    save_validation(folder.validation, alone, trials)
    with pytest.raises(
        AdapeftError, match=r"validation.json holds the results of other trials:\n  subsets: 3 here, 2 there"
    ):
        load_validation(folder.validation, trials.model_copy(update={"subsets": 3}))
    folder.claim(loaded).release()
    with pytest.raises(AdapeftError, match="holds another run:\n  seed: 1 here, 0 there"):
        folder.claim(load_config(config, ["seed=1", f"output={tmp_path / 'out'}"]))
