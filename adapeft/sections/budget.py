"""The budget: the limit on trained parameters, as a fraction of the candidates, as a number, or found: ``auto``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

from adapeft.errors import AdapeftError

SPELLINGS = "write a fraction such as 0.5% or 0.005, a number of parameters such as 100000, 100k or 1.5M, or auto"

_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
# Commas divide thousands and nothing else: in many languages '0,5%' is half a percent, and five without its comma.
_TEXT = re.compile(
    r"\s*([-+]?(?:[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?)\s*(%|[kmgb]?)\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Budget:
    """A budget with either ``fraction`` or ``number``, never both.

    Exact rationals, because floors of floats lose parameters: ``int(0.29 * 100)`` is 28.

    Attributes:
        fraction: fraction of the model's parameters.
        number: number of parameters.
        is_auto: whether the choice takes fewer, if these promise nearly as much.
    """

    fraction: Fraction | None = None
    number: int | None = None
    is_auto: bool = False

    def __post_init__(self) -> None:
        assert (self.fraction is None) != (self.number is None), "a budget is a fraction or a number"

    @classmethod
    def parse(cls, value: object) -> Budget:
        """Parse a budget such as ``'0.5%'``, ``0.005``, ``100000``, ``'100k'``, ``'1.5M'`` or ``'auto'``.

        Numbers below 1 are fractions and whole numbers are counts; ``1.0`` is ambiguous and refused.

        Raises:
            AdapeftError: any other value.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise _refusal(value, SPELLINGS)
        if value == "auto":
            return replace(DEFAULT_BUDGET, is_auto=True)
        amount, unit = _split(value)
        if amount <= 0:
            raise _refusal(value, f"must be above 0; {SPELLINGS}")
        if unit == "%":
            if amount > 100:
                raise _refusal(value, "is more than all parameters; write at most 100%")
            return cls(fraction=amount / 100)
        if unit == "" and amount < 1:
            return cls(fraction=amount)
        if amount == 1 and not isinstance(value, int) and unit == "" and str(value).strip() != "1":
            raise _refusal(value, "could mean all parameters or one; write 100% or 1")
        number = amount * _MULTIPLES[unit.lower()]
        if number.denominator != 1:
            raise _refusal(value, f"is neither a fraction below 1 nor a whole number; {SPELLINGS}")
        return cls(number=number.numerator)

    def count(self, total: int) -> int:
        """Return the number of parameters to train out of ``total``: rounded down, and at most ``total``.

        Raises:
            AdapeftError: the fraction is less than one parameter.
        """
        if self.number is not None:
            return min(self.number, total)
        assert self.fraction is not None
        count = math.floor(self.fraction * total)
        if count == 0 and total > 0:
            raise _refusal(str(self), f"is less than one of {total:,} parameters; write a number such as 100")
        return count

    def __str__(self) -> str:
        """Return a spelling that ``parse`` reads back."""
        if self.is_auto:
            return "auto"
        if self.number is not None:
            return str(self.number)
        assert self.fraction is not None
        percent = self.fraction * 100
        return f"{percent.numerator if percent.denominator == 1 else float(percent)}%"


DEFAULT_BUDGET = Budget(fraction=Fraction(1, 200))
"""The budget if none is given, and the most that ``auto`` takes: a random draw of this size is nearly as good as
training all parameters (tests/benchmarks/results)."""


def _split(value: str | int | float) -> tuple[Fraction, str]:
    """Return the exact amount and its unit: ``(3/2, 'M')`` for ``'1.5M'``."""
    # By the shortest decimal spelling: 0.005 means 1/200, not the nearest binary float.
    match = _TEXT.fullmatch(str(value))
    if match is None:
        raise _refusal(value, SPELLINGS)
    return Fraction(match[1].replace("_", "").replace(",", "")), match[2]


def _refusal(value: object, remedy: str) -> AdapeftError:
    return AdapeftError(f"budget = {value}: {remedy}")
