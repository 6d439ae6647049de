"""Learning rates to try, and what short trainings say of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping

from adapeft.parts.elements import Elements
from adapeft.subset.subset import Subset
from cluster.run.climb import climb

RATES = tuple(float(f"{digit}e{exponent}") for exponent in range(-7, 2) for digit in (1, 3))
"""1e-7, 3e-7, 1e-6, … 30. In the sweeps of tests/benchmarks/results scores differ little within such a step."""
_STEP = math.sqrt(10)

_SPREAD = math.log(2.5)
"""Standard deviation of the logarithm of the best rates of sweeps around ``usual_rate``."""
_CHANCE = 0.03
"""Standard deviation of the logarithm of a held-out loss between trials by chance. After 28 steps of MRPC the losses of
rates from 1e-4 to 3e-2 lie between 0.650 and 0.673 in no order, where those of SmolLM2 after 4 differ by 15 %. Of ten
searches the rates found are off those of sweeps by a factor of 2 (root mean square of the logarithms), 3.5 at most; by
the lowest loss alone by 4, 21 at most, on MRPC."""
_EXPONENT = 0.16
"""The best rate falls with the number of steps T, as T^-0.32 where trainings are long (Bjorck et al., "Scaling Optimal
LR Across Token Horizons", 2024). From trials of 8 or 11 steps to whole trainings it falls as T^-0.25 to T^-0.5 (MiniLM
on the docstrings and STS-B), or rises as T^0.3 (SmolLM2 on nl2bash). Rather too low than too high: without it the ten
searches are off by 1.7, but LoRA on the docstrings comes apart (1.9e-2: 0.103, where 8e-3 has 0.608)."""
_DIVERGING = math.log(1.5) / _CHANCE
"""A doubt above the lowest by this, a loss of 1.5 times the best, is no chance: the rate is too high, and so are higher
ones. SmolLM2 has 1.6 times the loss of the best trial after 4 steps at 0.1, and 3.2 times after 8."""


def usual_rate(subset: Subset) -> float:
    """Return the rate to expect for a subset, from the fraction p of the model that it trains.

    It is 3e-4 / p^0.6 for single elements and a third of that for everything else, whose parameters push the outputs
    alike. The best rates of the sweeps in tests/benchmarks/results lie within a factor of six of it, most within two:
    elements of MiniLM at 2 % 2e-3 to 4e-3, at 0.5 % 4e-3 to 1.6e-2, at 0.01 % 3e-2 to 1.2e-1; LoRA at 0.37 % 2e-3 to
    8e-3; full training 5e-5 to 2e-4; of SmolLM2 elements 6.4e-2, LoRA 6.4e-3 to 1.6e-2.
    """
    total = subset.choice.num_total
    fraction = subset.count / total if total and subset.count else 1.0
    are_elements = all(isinstance(part, Elements) for part in subset.parts.values())
    return (3e-4 if are_elements else 1e-4) / fraction**0.6


def criterion(scores: Mapping[str, float] | None) -> tuple[str, float]:
    """Return the name and value of what a trial should keep low: the loss, or of a regression 1 - r|r|.

    With Pearson's r, this is the share of the variance that no shift and scale of the predictions explains. Few steps
    of a regression mostly move the mean, which a whole training does at any rate: after 11 steps of STS-B losses are
    lowest at 3e-3 and correlations highest at 1e-2, where whole trainings are best from 8e-3 to 3e-2.
    """
    if scores is None:
        return "held-out loss", math.inf
    if "pearson" in scores:
        return "held-out unexplained variance", 1 - scores["pearson"] * abs(scores["pearson"])
    return "held-out loss", float(scores["loss"])


def doubt(loss: float, rate: float, usual: float) -> float:
    """Return how little speaks for a rate, up to a constant: minus the logarithm of its probability after a trial.

    Losses and best rates are taken as lognormal. Where trials differ by more than chance they decide, and where they
    do not, because the task shows nothing in so few steps, the usual rate does.

    Args:
        loss: the value of ``criterion``; at least 0, inf if the trial diverged.
        rate: the rate of the trial.
        usual: the rate that ``usual_rate`` expects.
    """
    return math.log(max(loss, sys.float_info.min)) / _CHANCE + (math.log(rate / usual) / _SPREAD) ** 2 / 2


def least_doubtful(loss_of: Callable[[float], float], usual: float) -> tuple[int, dict[int, float]]:
    """Try rates from the usual one on, as long as one of their neighbours is less in doubt.

    Doubts already count what is chance in the losses, so that direct neighbours suffice: in 23 recorded searches rates
    two steps away changed nothing, and were 1.4 of 5 trials. They are tried where nearer ones give no finite loss.

    Args:
        loss_of: makes a trial of a rate and returns the value of its ``criterion``; called once per rate.
        usual: the rate that ``usual_rate`` expects.

    Returns:
        The index of the rate that is least in doubt, and the doubts of those that were tried by index.
    """
    doubts: dict[int, float] = {}

    def score(index: int) -> float:
        if index not in doubts:
            doubts[index] = doubt(loss_of(RATES[index]), RATES[index], usual)
        return -doubts[index]

    nearest = min(range(len(RATES)), key=lambda index: abs(math.log(RATES[index] / usual)))

    def climbed(width: int) -> int:
        return climb(score, nearest, len(RATES), lambda low, best: low < best - _DIVERGING, width=width)

    best = climbed(1)
    return (best if math.isfinite(doubts[best]) else climbed(2)), doubts


def refined(index: int, doubts: Mapping[int, float], share: float) -> float:
    """Return the rate at the minimum of the parabola through the doubts of a rate and its neighbours.

    Args:
        index: index of the rate with the lowest doubt.
        doubts: doubts by index; neighbours that were not tried, or diverged, tell nothing.
        share: steps of a trial as a share of those of the training, for which the rate is.
    """
    before, lowest, after = (doubts.get(near, math.inf) for near in (index - 1, index, index + 1))
    curvature = before - 2 * lowest + after
    steps = 0.5 * (before - after) / curvature if 0 < curvature < math.inf else 0.0
    return float(f"{RATES[index] * _STEP**steps * share**_EXPONENT:.2g}")
