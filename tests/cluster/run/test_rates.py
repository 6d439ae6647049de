"""Learning rates by what short trainings say of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adapeft.parts.elements import Elements
from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from adapeft.tasks.metrics.scores import correlations
from cluster.run.rates import RATES, criterion, doubt, least_doubtful, refined, usual_rate


def test_a_trial_of_a_regression_is_judged_by_what_no_shift_and_scale_explains():
    """The mean of the targets, which every training finds, outweighs in a few steps what the rates differ in."""
    targets = torch.tensor([0.0, 1.0, 3.0, 4.0])
    noisy = torch.tensor([2.1, 1.7, 2.3, 2.2])
    far, some, opposite = (
        criterion({"loss": 1.0, **correlations(predictions, targets)})[1]
        for predictions in (targets * 9 + 30, noisy, -targets)
    )
    slope, shift = np.polyfit(noisy, targets, 1)
    unexplained = (targets - slope * noisy - shift).square().mean() / targets.var(correction=0)
    assert (far, some, opposite) == tuple(pytest.approx(value, abs=1e-6) for value in (0, unexplained.item(), 2))
    assert 0 < some < 1
    assert criterion({"loss": 1.5, "accuracy": 0.9}) == ("held-out loss", 1.5)
    assert criterion(None)[1] == math.inf


@pytest.mark.parametrize(("count", "rate"), [(1_000_000, 3e-4), (5_000, 7.2e-3), (100, 7.5e-2)])
def test_the_fewer_parameters_the_higher_the_usual_rate(count, rate):
    subset = Subset({"w": Elements((1_000_000,), torch.arange(count))}).described(num_total=1_000_000)
    assert usual_rate(subset) == pytest.approx(rate, rel=0.01)
    assert usual_rate(Subset({"w": subset.parts["w"]})) == pytest.approx(3e-4), "as if all were trained"


def test_rows_have_a_third_of_the_usual_rate_of_elements():
    rows = Rows((1000, 1000), torch.arange(5))
    subset = Subset({"w": rows}).described(num_total=1_000_000)
    assert usual_rate(subset) == pytest.approx(7.2e-3 / 3, rel=0.01)


def found_by(losses, usual, share=1.0):
    """Return the rate that a search finds among trials with these losses, by rate."""
    return refined(*least_doubtful(lambda rate: losses.get(rate, math.inf), usual), share)


# LoRA and random elements on MRPC (28 of 458 steps), LoRA on nl2bash (4 of 40): what was measured, and the best rate
# of a sweep over whole trainings.
@pytest.mark.parametrize(
    ("losses", "usual", "share", "best"),
    [
        ({1e-4: 0.6502, 3e-4: 0.65, 1e-3: 0.6506, 3e-3: 0.6605, 1e-2: 0.6621, 3e-2: 0.6709}, 2.9e-3, 28 / 458, 2e-3),
        ({3e-4: 0.6499, 1e-3: 0.6496, 3e-3: 0.655, 1e-2: 0.6727, 3e-2: 0.6571}, 7.2e-3, 28 / 458, 8e-3),
        ({3e-3: 3.1324, 1e-2: 2.7892, 3e-2: 2.7044, 0.1: 4.4314}, 6.3e-3, 4 / 40, 1.6e-2),
    ],
)
def test_rates_are_those_of_sweeps_and_rather_too_low(losses, usual, share, best):
    found = found_by(losses, usual, share)
    assert best / 3.5 <= found <= 2 * best
    assert found == pytest.approx(found_by(losses, usual) * share**0.16, rel=0.05)


def test_losses_that_differ_by_more_than_chance_decide_against_what_is_usual():
    losses = {rate: 1.0 + math.log10(rate / 1e-1) ** 2 for rate in RATES}
    assert 0.05 < found_by(losses, 1e-3) < 0.2
    alike = dict.fromkeys(RATES, 1.0)
    assert found_by(alike, 2e-3) == pytest.approx(2e-3, rel=0.1), "where they do not differ the usual rate is found"


def test_no_rate_is_tried_twice_and_farther_ones_only_where_no_near_one_has_a_loss():
    def tried(largest):
        asked = []
        best, doubts = least_doubtful(lambda rate: asked.append(rate) or (1.0 if rate <= largest else math.inf), 1e-2)
        assert len(set(asked)) == len(asked)
        assert math.isfinite(doubts[best]) == (largest >= 1e-3)
        return sorted(asked)

    assert tried(math.inf) == [3e-3, 1e-2, 3e-2]
    assert tried(1e-2) == [3e-3, 1e-2, 3e-2]
    assert tried(3e-3) == [1e-3, 3e-3, 1e-2, 3e-2]
    assert tried(1e-3) == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    assert tried(1e-5) == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], "the data or the model may be the reason: few are tried"


def test_no_loss_is_left_in_no_doubt():
    assert doubt(0.0, 1e-3, 1e-3) < doubt(1e-9, 1e-3, 1e-3)
    assert doubt(math.inf, 1e-3, 1e-3) == math.inf


def test_the_rate_lies_where_the_parabola_through_the_doubts_has_its_minimum():
    middle = RATES.index(1e-3)
    for place in (-0.4, 0.0, 0.3):
        doubts = {middle + step: 2 * (step - place) ** 2 + 1 for step in (-1, 0, 1)}
        assert refined(middle, doubts, 1.0) == pytest.approx(1e-3 * 10 ** (place / 2), rel=0.05)
    assert refined(middle, {middle: 1.0, middle + 1: 2.0}, 1.0) == 1e-3, "a neighbour that was not tried tells nothing"
    assert refined(middle, {middle - 1: math.inf, middle: 1.0, middle + 1: 2.0}, 1.0) == 1e-3
    assert refined(middle, dict.fromkeys((middle - 1, middle, middle + 1), 1.0), 1.0) == 1e-3
