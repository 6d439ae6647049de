"""A step with a loss or gradient that is not finite changes only the schedule, at any ZeRO stage."""

from __future__ import annotations

import math

import pytest
import torch

from tests.on_ranks.skips import BAD_STEP, FAST, NUM_STEPS, RUNS, tag_of
from tests.on_ranks.training import LEARNING_RATE, falling
from tests.support.ranks import needed, run_on_ranks, with_slow

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("skips")
    run_on_ranks(2, "tests.on_ranks.skips", folder, needed(request))
    return folder


@pytest.mark.parametrize("run", with_slow(FAST, RUNS))
def test_a_skipped_step_changes_only_the_schedule(trained, run):
    found = torch.load(trained / f"{tag_of(run)}.pt", weights_only=False)
    spoilt, without = found["spoilt"], found["without"]
    assert [is_taken for is_taken, _ in spoilt["taken"]] == [step != BAD_STEP for step in range(NUM_STEPS)]
    assert math.isfinite(spoilt["taken"][BAD_STEP][1]) == (run[2] == "gradient")
    assert not spoilt["changed"], "values, moments and step counts"
    assert spoilt["rates"] == pytest.approx([LEARNING_RATE * falling(step) for step in range(NUM_STEPS)])
    assert without["values"].keys() == spoilt["values"].keys()
    for name, value in without["values"].items():
        assert torch.equal(spoilt["values"][name], value), name
