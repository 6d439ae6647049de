"""Exact scaling of real values to the integers that OR-Tools requires."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# OR-Tools sums profits in int64 and, past 2^62, silently returns an empty set.
TOTAL_BITS = 61


@dataclass(frozen=True)
class ScaledValues:
    r"""Integers :math:`w_i = \lceil 2^k v_i \rceil` with :math:`\sum_i w_i < 2^{62}`.

    A power of two scales floats exactly and the ceiling never rounds down, so every subset's value is at most
    :math:`2^{-k}` times its integer value: the integer optimum, scaled back, bounds the real one.

    Attributes:
        integers: The scaled values. int64 ``[N]``.
        exponent: k.
    """

    integers: np.ndarray
    exponent: int

    @classmethod
    def of(cls, values: np.ndarray) -> ScaledValues:
        """Scale positive values (float64 ``[N]``) to the range that OR-Tools can sum."""
        total = float(values.sum())
        exponent = TOTAL_BITS - int(np.frexp(total)[1])
        # Σw < 2^61 + N, because the ceiling adds less than 1 per item.
        return cls(np.ceil(np.ldexp(values, exponent)).astype(np.int64), exponent)

    def real(self, total: int) -> float:
        """Return the upper bound on the real value that corresponds to an integer total."""
        return float(np.ldexp(float(total), -self.exponent))
