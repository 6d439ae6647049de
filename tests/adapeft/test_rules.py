"""Rules of methods that move their mask: what they train equals the methods written down densely."""

from __future__ import annotations

import pytest
import torch

from tests.oracles_rules import BUDGET, CASES, dense_values, train_densely, train_with_adapeft
from tests.tiny import make_bert, make_gpt2


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("case", CASES)
def test_training_is_the_method_written_down_densely(case, make):
    delta, losses = train_with_adapeft(make, case)
    expected, expected_losses = train_densely(make, case)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    found = dense_values(delta, {name: value.shape for name, value in expected.items()})
    moved = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 * moved)
        if name not in delta.new:
            assert torch.equal(found[name] != 0, value != 0)
    if case.startswith(("child-pruning", "diff")):
        assert delta.count == BUDGET
    if case == "mixout-reset":  # some of those drawn belong to tokens that do not occur
        assert 0.9 * BUDGET < delta.count <= BUDGET
