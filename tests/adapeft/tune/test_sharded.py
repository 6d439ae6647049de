"""Tests of models that a trainer shards over ranks after attaching: their deltas are those of one process."""

from __future__ import annotations

import pytest
import torch

from adapeft import Delta, attach, delta
from tests.on_ranks.library import KINDS, WRAPPERS, batches_of, subset_of, train_on
from tests.oracles.parts import MODELS
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_on_ranks(2, "tests.on_ranks.library", folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_delta_is_that_of_one_process(wrapper, name, kind, out):
    model = MODELS[name]().eval()
    attach(model, subset_of(model, kind))
    train_on(model, batches_of(model), range(2), 2)
    expected = delta(model)
    for rank in range(2):
        found = Delta.load(out / f"{wrapper}-{name}-{kind}-{rank}.safetensors")
        assert found.changes.keys() == expected.changes.keys()
        assert found.new.keys() == expected.new.keys()
        for key, change in expected.changes.items():
            # Softmax is invariant to a bias of the keys: its gradient is rounding, or exactly zero.
            assert change.values.any() or key.endswith("key.bias")
            torch.testing.assert_close(found.changes[key].values, change.values, rtol=1e-3, atol=1e-5)
        for key, value in expected.new.items():
            torch.testing.assert_close(found.new[key], value, rtol=1e-3, atol=1e-5)


def test_what_is_sharded_already_is_refused_on_every_rank(out):
    for rank in range(2):
        refused = torch.load(out / f"refused-{rank}.pt")
        assert len([call for call in refused if not call.startswith("base")]) == 8
        assert "wrapped in DistributedDataParallel" in refused["attach ddp"]
        for call in ("attach", "select", "Delta.apply"):
            assert "sharded by FullyShardedDataParallel" in refused[f"{call} fsdp1"]
            assert "DTensor" in refused[f"{call} fsdp2"]
            assert f"Call adapeft.{call} " in refused[f"{call} fsdp2"]


def test_a_rank_that_attaches_another_subset_than_the_first_is_told(out):
    """The first does not wait for the others, and the same subset is attached by both afterwards."""
    messages = [torch.load(out / f"refused-{rank}.pt")["attach another subset"] for rank in range(2)]
    assert sorted(bool(message) for message in messages) == [False, True]
    last = int(bool(messages[1]))
    assert messages[last].startswith(f"rank {last} attaches another subset than rank {1 - last}. Choose on one rank")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_delta_is_switched_off_in_place_except_for_tensors_that_are_divided(wrapper, name, kind, out):
    """Also between the forward and the backward pass of the training, whose delta is compared above."""
    untouched = MODELS[name]().eval()
    for rank in range(2):
        message = torch.load(out / f"refused-{rank}.pt")[f"base {wrapper} {name} {kind}"]
        if wrapper != "ddp" and kind in ("tensor", "lora"):  # this LoRA comes with whole norms
            how = "FullyShardedDataParallel" if wrapper == "fsdp1" else "a DTensor"
            assert f"is trained whole and divided over ranks ({how}" in message
            continue
        assert not message
        before, inside, after = torch.load(out / f"based-{wrapper}-{name}-{kind}-{rank}.pt")
        assert torch.equal(before, after)
        new = Delta.load(out / f"{wrapper}-{name}-{kind}-{rank}.safetensors").new
        with torch.no_grad():
            for key, value in new.items():  # a new head keeps its trained values
                untouched.get_parameter(key).copy_(value)
            expected = untouched(**batches_of(untouched)[0]).logits
        torch.testing.assert_close(inside, expected)
        assert not torch.allclose(inside, before)
