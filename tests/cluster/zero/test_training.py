"""Training a subset equals plain AdamW at any ZeRO stage and world size, with state of the subset only."""

from __future__ import annotations

import pytest
import torch

from tests.on_ranks.training import CASES, FAST, RUNS, STAGES, train_plainly
from tests.support.ranks import needed, run_on_ranks, with_slow

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def trained(request, tmp_path_factory):
    """The folder of results trained on this many ranks, and their number."""
    folder = tmp_path_factory.mktemp(f"trained-{request.param}")
    run_on_ranks(request.param, "tests.on_ranks.training", folder, needed(request))
    return folder, request.param


@pytest.fixture(scope="module")
def plain():
    return {case: train_plainly(*case) for case in CASES}


@pytest.mark.parametrize("run", with_slow(FAST, RUNS))
def test_training_is_plain_adamw_on_the_subset(trained, plain, run):
    folder, world_size = trained
    name, kind, stage, micro_batch_size, _ = run
    found = torch.load(folder / f"{name}-{kind}-{stage}-{micro_batch_size}.pt", weights_only=False)
    expected = plain[name, kind]

    assert found["values"].keys() == expected.keys()
    moved = max(float(value.abs().max()) for value in expected.values())
    for parameter, value in expected.items():
        torch.testing.assert_close(found["values"][parameter], value, rtol=1e-2, atol=2e-3 * moved)

    assert found["start_equal"], "what is attached changes no output before it is trained"
    for parameter, value in found["resumed"].items():
        assert torch.equal(value, found["values"][parameter]), "a step past the checkpoint and back"
    assert bool(found["resumed"]) == (kind == "mixed")
    if kind == "mixed":
        lacking, missing = found["refused"]
        assert (
            "step-5: the checkpoint is damaged or of another subset. Remove the folder to train from the start."
            in lacking
        )
        assert f"step-5: {world_size - 1} of {world_size} shards are there. Remove the folder" in missing

    # Two moments per trained element over all ranks (each rank its own copy at stage 0), and padding.
    copies = world_size if stage == 0 else 1
    assert 2 * found["count"] <= found["state_elements"] / copies <= 2 * found["count"] + 4 * 64 * world_size
    assert found["frozen_with_gradient"] == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_is_as_large_as_the_subset(trained, stage):
    folder, world_size = trained
    micro_batch_size = next(micro for run_stage, micro, checkpointing in STAGES if run_stage == stage)
    sizes = {}
    for kind in ("tensor", "elements"):
        found = torch.load(folder / f"bert-{kind}-{stage}-{micro_batch_size}.pt", weights_only=False)
        sizes[kind] = found["checkpoint_bytes"], found["count"]
    # Weight, master weight and two moments, 16 bytes per element and rank, plus a fixed amount of bookkeeping.
    for size, count in sizes.values():
        assert size < 16 * count * world_size + 100_000 * world_size
