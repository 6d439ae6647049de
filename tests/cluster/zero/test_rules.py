"""Rules on shards give the result of one plain process at every ZeRO stage and world size, also after a stop."""

from __future__ import annotations

import pytest
import torch

from tests.on_ranks.rules import FAST, RUNS, tag_of
from tests.on_ranks.statistics import MODELS
from tests.oracles.rules import CASES, NUM_STEPS, dense_values, make_model, train_with_adapeft
from tests.support.ranks import needed, run_on_ranks, with_slow
from tests.support.tiny import make_batches

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 2])
def trained(request, tmp_path_factory):
    """The results of training on this many ranks, and their number."""
    folder = tmp_path_factory.mktemp(f"rules-{request.param}")
    run_on_ranks(request.param, "tests.on_ranks.rules", folder, needed(request))
    return folder, request.param


@pytest.fixture(scope="module")
def plain():
    return {(name, case): train_with_adapeft(MODELS[name], case) for name in MODELS for case in CASES}


@pytest.mark.parametrize("run", with_slow(FAST, RUNS))
def test_training_on_shards_is_plain_training(trained, plain, run):
    folder, world_size = trained
    name, case, stage, *_, persistence = run
    found = torch.load(folder / f"{tag_of(run)}.pt", weights_only=False)
    delta, losses = plain[name, case]
    assert found["losses"] == pytest.approx(losses, rel=1e-3)

    base = make_model(MODELS[name]).eval()
    shapes = {parameter: value.shape for parameter, value in base.named_parameters()}
    values, expected = dense_values(found["delta"], shapes), dense_values(delta, shapes)
    moved = max(float(value.abs().max()) for value in expected.values())
    for parameter, value in expected.items():
        torch.testing.assert_close(values[parameter], value, rtol=1e-2, atol=2e-3 * moved)
        if parameter not in delta.new:
            assert torch.equal(values[parameter] != 0, value != 0), "another mask"

    found["delta"].apply(base)
    with torch.no_grad():
        assert found["evaluated"] == pytest.approx(
            float(base(**make_batches(base, num_batches=NUM_STEPS + 1)[0]).loss), rel=1e-4
        )

    if stage == 3 and not persistence:
        # Base, leaves and gates are divided, up to one element of padding per tensor.
        assert max(found["held"]) <= found["total"] / world_size + 500
    if stage > 0:
        assert sum(found["state_elements"]) <= 2 * found["trained"] + 4 * 64 * world_size * 4
