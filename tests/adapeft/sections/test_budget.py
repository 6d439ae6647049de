"""Tests of the spellings of a budget and of its counts."""

from __future__ import annotations

from fractions import Fraction

import pytest

from adapeft.errors import AdapeftError
from adapeft.sections.budget import Budget


@pytest.mark.parametrize(
    ("written", "budget"),
    [
        ("0.5%", Budget(fraction=Fraction(1, 200))),
        (0.005, Budget(fraction=Fraction(1, 200))),
        ("0.005", Budget(fraction=Fraction(1, 200))),
        ("1e-3", Budget(fraction=Fraction(1, 1000))),
        ("100%", Budget(fraction=Fraction(1))),
        (" 2 % ", Budget(fraction=Fraction(1, 50))),
        (1, Budget(number=1)),
        ("1", Budget(number=1)),
        (100000, Budget(number=100_000)),
        (1e5, Budget(number=100_000)),
        ("100k", Budget(number=100_000)),
        ("1,500,000", Budget(number=1_500_000)),
        ("1.5M", Budget(number=1_500_000)),
        ("0.5k", Budget(number=500)),
        ("2b", Budget(number=2 * 10**9)),
        ("1_000", Budget(number=1000)),
        (Budget(number=3), Budget(number=3)),
        ("auto", Budget(fraction=Fraction(1, 200), is_auto=True)),
    ],
)
def test_spellings(written, budget):
    assert Budget.parse(written) == budget


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (0, "budget = 0: must be above 0; write a fraction such as 0.5%"),
        ("0%", "budget = 0%: must be above 0"),
        (-5, "budget = -5: must be above 0"),
        ("-0.5%", "budget = -0.5%: must be above 0"),
        ("150%", "budget = 150%: is more than all parameters; write at most 100%"),
        (1.5, "budget = 1.5: is neither a fraction below 1 nor a whole number"),
        (1.0, "budget = 1.0: could mean all parameters or one; write 100% or 1"),
        ("0.0001k", "budget = 0.0001k: is neither"),
        ("0,5%", "budget = 0,5%: write a fraction such as 0.5%"),
        ("1,5M", "budget = 1,5M: write"),
        ("1,00", "budget = 1,00: write"),
        ("1e999999999", "budget = 1e999999999: write"),
        ("lots", "budget = lots: write a fraction such as 0.5% or 0.005, a number"),
        (float("nan"), "budget = nan: write"),
        (float("inf"), "budget = inf: write"),
        (True, "budget = True: write"),
        (None, "budget = None: write"),
        ([1], r"budget = \[1\]: write"),
    ],
)
def test_refusals(written, message):
    with pytest.raises(AdapeftError, match=message):
        Budget.parse(written)


@pytest.mark.parametrize("written", ["0.5%", "0.0001%", "33.3%", "100%", "7", "1500000", "auto"])
def test_text_is_read_back(written):
    assert str(Budget.parse(written)) == written
    assert Budget.parse(str(Budget.parse(written))) == Budget.parse(written)


def test_count_rounds_down_exactly():
    assert Budget.parse("0.5%").count(1999) == 9
    assert Budget.parse(0.29).count(100) == 29  # int(0.29 * 100) is 28
    assert Budget.parse("100%").count(10**12 + 1) == 10**12 + 1


def test_count_is_at_most_everything():
    assert Budget.parse("1M").count(1000) == 1000
    assert Budget.parse("10").count(1000) == 10


def test_count_of_nothing_is_refused():
    with pytest.raises(AdapeftError, match=r"budget = 0.1%: is less than one of 500 parameters; write a number"):
        Budget.parse("0.1%").count(500)


def test_is_frozen():
    with pytest.raises(AttributeError):
        Budget.parse(5).number = 6
