"""``adapeft transfer`` chooses for another size of a model from a run's statistics; only verifying needs data."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from transformers import BertConfig, BertModel

from adapeft.choose.knapsack import chosen_of
from adapeft.config.experiments import Transfer
from adapeft.config.load import load_config
from adapeft.config.write import to_yaml
from adapeft.errors import AdapeftError
from adapeft.files.artifact import save_text
from adapeft.measure.storage import load_groups, save_groups
from adapeft.methods.adapeft import options
from adapeft.methods.registry import get_method
from adapeft.subset.subset import Subset
from adapeft.tune.attach import attach
from cluster.commands.transfer import transfer as transferring
from cluster.ranks.inputs import load_inputs
from tests.cluster.run.test_pipeline import text_of
from tests.support.checkpoints import adapeft, write_bert, write_colours, write_config

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return the folder of the base and data, and the folder of a run that measured rows."""
    folder = tmp_path_factory.mktemp("source")
    config = write_config(folder / "run.yaml", write_bert(folder / "base"), *write_colours(folder))
    text_of(adapeft("select", config, "groups=row", "budget=10%", "cluster.launcher=local"))
    return folder, folder / "run"


def assert_held_on_other_examples(verified, subset, output):
    """Check that captured values come from statistics on examples that the target's own choice did not use."""
    best = Subset.load(output / "measured" / "subset.safetensors")
    groups, columns, _ = load_groups(output / "measured-again")
    assert not np.array_equal(columns["slope"], load_groups(output / "measured")[1]["slope"])
    values = get_method("adapeft").values(columns, best.choice.reach)
    mine, own = (values[chosen_of(groups, one) > 0].sum() for one in (subset, best))
    assert verified["transferred"]["captured"] == pytest.approx(mine / own)


@pytest.fixture(scope="module")
def larger(source, tmp_path_factory):
    """Return a base with twice the depth, 1.5 times the width and the same tokenizer."""
    folder = tmp_path_factory.mktemp("larger")
    shutil.copytree(source[0] / "base", folder / "base")
    config = BertConfig.from_pretrained(folder / "base")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 4, 24, 36
    BertModel(config).save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture
def transferred(command, source):
    """Run the command in this process, without verifying, which needs a separate process."""

    def run(model, output, *overrides):
        return command("transfer", "--from", source[1], "--to", model, f"output={output}", *overrides)

    return run


@pytest.mark.slow
def test_a_larger_model_is_chosen_for_and_verified(source, larger, tmp_path):
    output = text_of(
        adapeft(
            *("transfer", "--from", source[1], "--to", larger),
            *(f"output={tmp_path / 'out'}", "budget=5%", "verify=true"),
        )
    )
    assert "mapped" in output
    subset = Subset.load(tmp_path / "out" / "subset.safetensors")
    said = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert 0 < subset.count == said["trained"] <= 0.05 * subset.choice.num_total
    assert said["value"] <= said["bound"]
    assert said["mapped"] == 1.0
    assert "rows" in {part.kind for part in subset.parts.values()} <= {"rows", "tensor"}
    for name in ("transferred", "uniform", "random"):
        assert f"{name} " in output
        assert said["verified"][name]["captured"] >= 0
        assert 0 <= said["verified"][name]["overlap"] <= 1
    assert -1 <= said["verified"]["density_correlation"] <= 1
    assert_held_on_other_examples(said["verified"], subset, tmp_path / "out")

    # The subset fits the model that a run would train, including its fingerprint.
    config = load_config(source[1] / "config.yaml", [f"model.name={larger}"])
    attach(load_inputs(config).model(), subset)


@pytest.mark.slow
def test_a_config_is_enough_for_whole_tensors(source, transferred, larger, tmp_path):
    shutil.copytree(larger, tmp_path / "laptop")
    (tmp_path / "laptop" / "model.safetensors").unlink()
    away = source[0] / "train.jsonl"
    away.rename(away.with_suffix(".away"))  # the data is not needed either
    try:
        refused = transferred(tmp_path / "laptop", tmp_path / "out", "budget=5%")
        assert refused.returncode == 2
        assert "set groups: tensor" in refused.stderr
        assert not (tmp_path / "out").exists()
        output = text_of(transferred(tmp_path / "laptop", tmp_path / "out", "budget=5%", "groups=tensor"))
    finally:
        away.with_suffix(".away").rename(away)
    assert "tensor" in output
    subset = Subset.load(tmp_path / "out" / "subset.safetensors")
    assert {part.kind for part in subset.parts.values()} == {"tensor"}
    assert subset.choice.fingerprint is None


def test_rows_of_largest_gradient(transferred, larger, tmp_path):
    text_of(transferred(larger, tmp_path / "norm", "budget=5%"))
    text_of(transferred(larger, tmp_path / "gradient", "budget=5%", "inside=gradient"))
    norm, gradient = (Subset.load(tmp_path / name / "subset.safetensors") for name in ("norm", "gradient"))
    assert norm.count == gradient.count, "the shares of the tensors are the same"
    assert repr(dict(norm.parts)) != repr(dict(gradient.parts))


def test_own_slopes_choose_for_the_same_model_what_it_chose_itself(source, transferred, tmp_path):
    text_of(transferred(source[0] / "base", tmp_path / "out", "budget=10%", "inside=slope"))
    own, subset = (Subset.load(folder / "subset.safetensors") for folder in (source[1], tmp_path / "out"))
    groups, columns, _ = load_groups(source[1])
    values = get_method("adapeft").values(columns, own.choice.reach)
    held, best = (values[chosen_of(groups, one) > 0].sum() for one in (subset, own))
    assert held > 0.98 * best
    assert subset.choice.fingerprint == own.choice.fingerprint
    said = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert said["mapped"] == 1.0
    assert said["value"] == pytest.approx(own.choice.value, rel=0.05)


def test_own_slopes_of_a_method_that_has_none(command, source, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(source[1], run)
    groups, columns, key = load_groups(source[1])
    save_groups(run, groups, {"squared_gradient": columns["slope"]}, key)
    save_text(run / "config.yaml", to_yaml(load_config(run / "config.yaml", ["method=sam", "groups=row"])))
    done = command("transfer", "--from", run, "--to", source[0] / "base", f"output={tmp_path / 'out'}", "inside=slope")
    assert done.returncode == 2
    assert "inside = slope: sam measures no slopes. Give inside=gradient." in " ".join(done.stderr.split())


def test_a_run_that_filled_up_a_joint_choice_is_a_source_too(source, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(source[1], run)
    save_text(run / "config.yaml", to_yaml(load_config(run / "config.yaml", ["groups=element", "fill=true"])))
    select = transferring.target_config(run, str(source[0] / "base"), Transfer(), []).select
    assert (select.joint, select.fill) == (False, "auto")
    with pytest.raises(AdapeftError, match="fill = true: only the joint choice"):
        transferring.target_config(run, str(source[0] / "base"), Transfer(), ["select.fill=true"])


def test_own_slopes_divide_the_budget_among_tensors(transferred, larger, tmp_path):
    for inside in ("gradient", "slope"):
        text_of(transferred(larger, tmp_path / inside, "budget=5%", f"inside={inside}"))
    shares = [
        {name: part.count for name, part in Subset.load(tmp_path / inside / "subset.safetensors").parts.items()}
        for inside in ("gradient", "slope")
    ]
    assert shares[0] != shares[1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["inside=luck"], "inside = luck: should be 'auto', 'weight-norm', 'gradient' or 'slope'"),
        (["model.name=elsewhere"], "model.name = elsewhere: --to names another target"),
        (["select.method=sam"], "measured for adapeft. Leave select.method out, or give a run of sam"),
        (["budget=auto"], "divides a given budget among the parameters of the target. Give one, such as budget"),
        (["budget=400%"], "budget = 400%: is more than all parameters"),
        (["groups=tensor", "inside=gradient"], "tensor groups are trained whole"),
        (["selekt.budget=1%"], "selekt"),
        (["select.joint=true"], "select.joint = true: the joint curvature of groups cannot be transferred"),
        (["select.measure=low-rank", "inside=slope"], "inside = slope: needs the gradients of single elements of"),
        (["select.direction=gradient"], "select.direction: gradient here, adam there"),
        (["select.options=[row,lora]"], "Give select.options=[] to transfer the rows"),
        (["select.servable=true"], "select.servable = true: transfer divides the budget among all parameters"),
        (["quantization=nf4"], "is quantized (nf4), and a transferred subset belongs to the weights"),
    ],
)
def test_bad_input(transferred, larger, tmp_path, overrides, said):
    done = transferred(larger, tmp_path / "out", *overrides)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["gradient", "slope"])
def test_gradients_inside_a_target_that_auto_measures_with_low_rank(transferred, larger, tmp_path, monkeypatch, inside):
    monkeypatch.setattr(options, "_SMALL", 0)
    done = transferred(larger, tmp_path / "out", f"inside={inside}")
    assert done.returncode == 2
    assert f"inside = {inside}: needs the gradients of single elements" in done.stderr
    assert "low-rank, as auto is for a model of" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_revision_of_the_source_is_not_one_of_the_target(source, tmp_path):
    """The same branch or tag may exist in both repositories, with something else."""
    config = load_config(source[1] / "config.yaml")
    old = config.model_copy(update={"model": config.model.model_copy(update={"name": "org/small", "revision": "v1.0"})})
    shutil.copytree(source[1], tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(old))
    target = transferring.target_config(tmp_path / "run", "org/larger", Transfer(), [])
    assert (target.model.name, target.model.revision) == ("org/larger", None)
    assert transferring._changed(target, tmp_path / "run") == "model.name=org/larger model.revision=null"
    given = transferring.target_config(tmp_path / "run", "org/larger", Transfer(), ["model.revision=v2.0"])
    assert given.model.revision == "v2.0"
    assert transferring._changed(given, source[1]) == "model.name=org/larger model.revision=v2.0"
    assert transferring._changed(target, source[1]) == "model.name=org/larger"


def test_the_target_s_weights_are_those_of_its_revision(source, monkeypatch):
    opened = []
    monkeypatch.setattr(transferring, "open_checkpoint", lambda *arguments: opened.append(arguments))
    config = load_config(source[0] / "run.yaml", ["model.name=org/larger", "model.revision=v1.0"])
    transferring._checkpoint(config, None)
    assert opened == [("org/larger", None, "v1.0")]


def test_where_there_is_no_run(command, source, transferred, larger, tmp_path):
    done = command("transfer", "--from", tmp_path, "--to", larger, f"output={tmp_path / 'out'}")
    assert "no run with statistics" in done.stderr
    done = command("transfer", "--from", source[1], "--to", larger)
    assert "holds a subset already" in done.stderr
    done = transferred(tmp_path / "nowhere", tmp_path / "out")
    assert "--to" in done.stderr
    assert done.returncode == 2
