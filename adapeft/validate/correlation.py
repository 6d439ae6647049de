"""Comparison of predictions with outcomes: rank correlations, and the fitted constant of the reach."""

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
        all: correlation over all draws.
        by_size: size → correlation over the draws of that size; 0 stands for single tensors. NaN if all predictions
            are equal.
    """

    all: float
    by_size: Mapping[float, float]


def correlate(
    predictions: Mapping[str, np.ndarray], decreases: np.ndarray, draws: Sequence[Draw]
) -> dict[str, Correlations]:
    """Return each estimator's correlations, sorted by that over all draws, the highest first."""
    sizes = np.array([draw.size for draw in draws])
    found = {
        name: Correlations(
            rank_correlation(predicted, decreases),
            {size: rank_correlation(predicted[sizes == size], decreases[sizes == size]) for size in np.unique(sizes)},
        )
        for name, predicted in predictions.items()
    }
    return dict(sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].all, nan=-2.0)))


def fit_constant(predict: Callable[[float], np.ndarray], decreases: np.ndarray, sum_of_rates: float) -> float:
    """Return the c of ``CONSTANTS`` whose predictions at τ = c · Σ learning rates are nearest to the outcomes.

    The distance is the median of |log ratio| over draws with a positive prediction and decrease, because outcomes span
    several orders of magnitude.
    """
    errors = []
    for constant in CONSTANTS:
        predicted = predict(constant * sum_of_rates)
        good = (predicted > 0) & (decreases > 0)
        errors.append(np.median(np.abs(np.log(predicted[good] / decreases[good]))) if good.any() else np.inf)
    return float(CONSTANTS[int(np.argmin(errors))])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's ρ, NaN if one of the two is constant or they have fewer than 3 values."""
    # Not by the range of the values: diverged training has a decrease of −inf, and −inf − (−inf) is NaN.
    if len(a) < 3 or len(np.unique(a)) == 1 or len(np.unique(b)) == 1:
        return float("nan")
    return float(spearmanr(a, b).statistic)
