"""Under ZeRO, a weight that another module reads is trained like any other, and an unused one is reported."""

from __future__ import annotations

import pytest
import torch

from tests.on_ranks.reads import RUNS, Model, loss_of, train_plainly
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reads")
    run_on_ranks(2, "tests.on_ranks.reads", folder)
    return {run: torch.load(folder / f"{run[0]}-{run[1]}.pt", weights_only=False) for run in RUNS}


@pytest.fixture(scope="module")
def plain():
    return train_plainly()


@pytest.mark.parametrize("run", RUNS)
def test_training_is_plain_adamw(found, plain, run):
    values = found[run]["values"]
    assert values.keys() == plain.keys()
    for name, expected in plain.items():
        assert expected.ne(0).all()
        torch.testing.assert_close(values[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_measuring_sees_the_gradients_of_plain_torch(found, run):
    for step, gradient in enumerate(found[run]["gradients"]):
        model = Model()
        loss_of(model, step).backward()
        expected = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
        assert gradient == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_unused_weights_are_named_on_every_rank(found, run):
    (refused, reached), other = found[run]["ranks"]
    assert (refused, reached) == other
    assert set(reached) == {name for name, _ in Model().named_parameters() if "unused" not in name}
    ((step, message),) = refused
    assert step == 2
    assert "1 of the 2 trained parts of the subset received no gradient" in message
    assert "unused.weight" in message
