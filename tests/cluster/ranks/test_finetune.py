"""Training on ranks without Ray: resuming, and bf16."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import adapeft
from adapeft.config.load import load_config
from adapeft.measure.storage import load_groups
from cluster.inspection.plan import plan_training
from cluster.ranks.inputs import load_inputs
from tests.support.checkpoints import WITHOUT_DROPOUT, write_bert, write_colours, write_config
from tests.support.ranks import run_on_ranks
from tests.support.stages import TWELVE_STEPS

pytestmark = pytest.mark.ranks

OVERRIDES = ["groups=row", *TWELVE_STEPS]


def test_a_stopped_run_resumes_to_the_same_result(config, tmp_path):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    # Its options are relative to the optimizer's own learning rate.
    options = (*OVERRIDES, "lr_scheduler_type=polynomial", "train.lr_scheduler_kwargs={lr_end: 2e-3, power: 2}")
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *options, f"output={undisturbed}")
    run_on_ranks(2, "tests.on_ranks.finetune", 6, config, *options, f"output={stopped}")
    assert not (stopped / "result.json").exists()
    assert (stopped / "checkpoints" / "step-4").is_dir()
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *options, f"output={stopped}")

    planned = plan_training(load_config(config, options).train, 160).learning_rates()
    for folder, first in ((undisturbed, 1), (stopped, 5)):
        rates = json.loads((folder / "rates.json").read_text())
        # A rate is reported after a step, when the next one is set.
        assert rates == {str(step): planned[step] if step < 12 else 2e-3 for step in range(first, 13)}

    found = [json.loads((folder / "found-rates.json").read_text()) for folder in (undisturbed, stopped)]
    assert found == [1, 0], "the rate of the head is that of the checkpoint"
    results = [json.loads((folder / "result.json").read_text()) for folder in (undisturbed, stopped)]
    for key in ("before", "after", "last", "history", "head_learning_rate"):
        assert results[1][key] == results[0][key]
    deltas = [adapeft.Delta.load(folder / "delta.safetensors") for folder in (undisturbed, stopped)]
    for name, change in deltas[0].changes.items():
        assert torch.equal(deltas[1].changes[name].values, change.values)
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-12"]


@pytest.mark.slow
def test_the_head_has_a_learning_rate_of_its_own(config, tmp_path):
    rates = ("learning_rate=1e-30", "head_learning_rate=1e-2", "max_steps=4")
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, *rates, f"output={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["after"]["loss"] != result["before"]["loss"]
    changes = adapeft.Delta.load(tmp_path / "delta.safetensors").changes
    subset = adapeft.Subset.load(tmp_path / "subset.safetensors")
    assert max(float(changes[name].values.abs().max()) for name in subset.parts) < 1e-28


@pytest.mark.slow
def test_the_rate_of_the_head_follows_from_its_inputs(config, tmp_path):
    def trained(workers, *options):
        output = tmp_path / str(workers)
        rates = ("learning_rate=1e-30", "max_steps=2", "warmup_ratio=0", f"output={output}")
        run_on_ranks(workers, "tests.on_ranks.finetune", 0, config, *OVERRIDES, *rates, *options)
        return json.loads((output / "result.json").read_text()), output

    (two, output), (one, _) = trained(2, "zero_stage=3", "train.micro_batch_size=3"), trained(1, "zero_stage=0")
    inputs = load_inputs(load_config(config, OVERRIDES))
    model = adapeft.attach(inputs.model().eval(), adapeft.Subset.load(output / "subset.safetensors"))
    expected = adapeft.head_learning_rate(model, [inputs.train.collate(inputs.training_batches(0)[0][:32]).inputs])
    assert [result["head_learning_rate"] for result in (one, two)] == pytest.approx([expected, expected], rel=1e-5)
    # AdamW's first step is the rate, whatever the gradient; the schedule halves the second.
    trained = adapeft.Delta.load(output / "delta.safetensors").new["classifier.weight"]
    change = trained - model.get_parameter("classifier.weight").detach()
    assert expected < float(change.abs().max()) < 1.6 * expected


@pytest.mark.slow
def test_training_stops_when_the_metric_no_longer_improves(config, tmp_path):
    """No learning rate, so no evaluation is better than the first: patience 2 stops at the third of six."""
    still = ("learning_rate=1e-30", "metric=loss", "eval_steps=2", "save_steps=12", "early_stopping_patience=2")
    for _ in range(2):  # the second run resumes from the last checkpoint and takes no further step
        run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, *still, f"output={tmp_path / 'run'}")
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        assert [entry["step"] for entry in result["history"]] == [2, 4, 6]
        assert (result["best_step"], result["stopped_step"], result["num_steps"]) == (2, 6, 12)
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-6"]


def test_training_stops_by_the_task_s_own_metric(config, tmp_path):
    """The loss on the training data improves at every evaluation, and accuracy, which the config names, at none."""
    slow = ("learning_rate=1e-4", "head_learning_rate=1e-4", "metric=accuracy", "eval_steps=2", "save_steps=12")
    output = tmp_path / "run"
    options = (*OVERRIDES, *slow, "early_stopping_patience=2", f"output={output}", "zero_stage=0")
    seen = f"data.evaluation={load_config(config).data.train}"
    run_on_ranks(1, "tests.on_ranks.finetune", 0, config, *options, seen)
    result = json.loads((output / "result.json").read_text())
    losses, accuracies = zip(*((entry["loss"], entry["accuracy"]) for entry in result["history"]), strict=True)
    assert losses[0] > losses[1] > losses[2]
    assert len(set(accuracies)) == 1
    assert (result["best_step"], result["stopped_step"], result["num_steps"]) == (2, 6, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [(), ("select.measure=low-rank", "select.rank=4")],
    ids=["exact", "low-rank"],
)
def test_offloaded_weights_give_the_same_results(config, tmp_path, options):
    drive = tmp_path / "drive"
    drive.mkdir()

    def results(offload, *folder):
        output = tmp_path / offload
        overrides = (*OVERRIDES, *options, "max_steps=4", f"cluster.offload={offload}", *folder, f"output={output}")
        run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *overrides)
        for rank in (json.loads((output / f"parts-{rank}.json").read_text()) for rank in range(2)):
            for stage, on_disk in (("measuring", "of the base"), ("training", "frozen")):
                found = rank[stage]
                assert found["kept whole"] == 0 < found[on_disk]
                assert found["offload"] == ("none" if offload == "none" else "cpu")
                assert found["mapped"] == (found[on_disk] if offload == "nvme" else 0)
            assert (rank["measuring"]["windows"] > 0) == bool(options)
        delta = adapeft.Delta.load(output / "delta.safetensors")
        return json.loads((output / "result.json").read_text())["history"], load_groups(output)[1], delta.changes

    history, columns, changes = results("none")
    for found in (results("cpu"), results("nvme", f"cluster.offload_folder={drive}")):
        assert found[0] == history
        assert found[1].keys() == columns.keys()
        assert all(np.array_equal(found[1][name], column, equal_nan=True) for name, column in columns.items())
        assert found[2].keys() == changes.keys()
        assert all(torch.equal(found[2][name].values, change.values) for name, change in changes.items())


@pytest.mark.slow
def test_a_stopped_run_resumes_with_other_numbers_of_workers(tmp_path):
    """Two workers, then one, then two, each time at another ZeRO stage. Dropout is off: it depends on the worker."""
    config = write_config(
        tmp_path / "run.yaml", write_bert(tmp_path / "base", **WITHOUT_DROPOUT), *write_colours(tmp_path)
    )
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, f"output={undisturbed}")
    run_on_ranks(2, "tests.on_ranks.finetune", 6, config, *OVERRIDES, f"output={stopped}", "zero_stage=3")
    run_on_ranks(1, "tests.on_ranks.finetune", 10, config, *OVERRIDES, f"output={stopped}", "zero_stage=0")
    assert (stopped / "checkpoints" / "step-8").is_dir()
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, f"output={stopped}", "zero_stage=2")

    results = [json.loads((folder / "result.json").read_text()) for folder in (undisturbed, stopped)]
    assert [entry["step"] for entry in results[1]["history"]] == [4, 8, 12]
    for entry, expected in zip(results[1]["history"], results[0]["history"], strict=True):
        assert entry == pytest.approx(expected, rel=1e-3)
    deltas = [adapeft.Delta.load(folder / "delta.safetensors") for folder in (undisturbed, stopped)]
    for name, change in deltas[0].changes.items():
        torch.testing.assert_close(deltas[1].changes[name].values, change.values, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_with_gradient_checkpointing_measures_and_trains(config, tmp_path, zero_stage):
    precision = [
        "dtype=bfloat16",
        "gradient_checkpointing=true",
        f"zero_stage={zero_stage}",
        "learning_rate=3e-2",
        "max_steps=40",
        "metric=loss",
    ]
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, *precision, f"output={tmp_path / 'bf16'}")
    result = json.loads((tmp_path / "bf16" / "result.json").read_text())
    assert result["after"]["loss"] < result["before"]["loss"]
    delta = adapeft.Delta.load(tmp_path / "bf16" / "delta.safetensors")
    # The master weights are float32: a delta of bf16 values would be exact after rounding to bf16.
    values = torch.cat([change.values.flatten() for change in delta.changes.values()])
    assert not torch.equal(values, values.bfloat16().float())
