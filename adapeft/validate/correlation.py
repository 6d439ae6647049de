"""Predictions against outcomes: rank correlations, and the constant of the reach that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from adapeft.validate.draw import Draw

CONSTANTS = np.geomspace(0.003, 3.0, 31)
"""Candidates for the constant c of τ = c · Σ learning rates."""


@dataclass(frozen=True)
class Correlations:
    """Spearman's rank correlation of an estimator's predictions with the measured decreases.

    Attributes:
        all: over all draws.
        by_size: size → over the draws of that size; 0 stands for single tensors. NaN where all predictions are equal.
    """

    all: float
    by_size: Mapping[float, float]


def correlate(
    predictions: Mapping[str, np.ndarray], decreases: np.ndarray, draws: Sequence[Draw]
) -> dict[str, Correlations]:
    """Each estimator's correlations, the best over all draws first."""
    sizes = np.array([draw.size for draw in draws])
    found = {
        name: Correlations(
            rank_correlation(foretold, decreases),
            {size: rank_correlation(foretold[sizes == size], decreases[sizes == size]) for size in np.unique(sizes)},
        )
        for name, foretold in predictions.items()
    }
    return dict(sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].all, nan=-2.0)))


def fit_constant(predict: Callable[[float], np.ndarray], decreases: np.ndarray, sum_of_rates: float) -> float:
    """The c of ``CONSTANTS`` at which the predictions at τ = c · Σ learning rates are nearest to the outcomes.

    Nearest in the median of |log ratio| over draws that gained and were foretold to: outcomes span decades.
    """
    errors = []
    for constant in CONSTANTS:
        foretold = predict(constant * sum_of_rates)
        good = (foretold > 0) & (decreases > 0)
        errors.append(np.median(np.abs(np.log(foretold[good] / decreases[good]))) if good.any() else np.inf)
    return float(CONSTANTS[int(np.argmin(errors))])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's ρ, NaN where one of the two is constant."""
    # Not by the range of the values: a training that diverged has a decrease of −inf, and −inf − (−inf) is NaN.
    if len(a) < 3 or len(np.unique(a)) == 1 or len(np.unique(b)) == 1:
        return float("nan")
    return float(spearmanr(a, b).statistic)
