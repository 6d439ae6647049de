"""The verdict on a choice."""

from __future__ import annotations

import pytest

from adapeft.subset.choice import Choice
from adapeft.subset.verdict import verdict_of

MANY = {"reliability": 0.4, "directions": 18.0, "candidate_directions": 29.0}
FEWEST = {"share": 0.99, "unspent": 0, "num_total": 10_000, "num_groups": 9_000}
NARROW = {"reliability": 0.91, "directions": 4.6, "candidate_directions": 78.0}


@pytest.mark.parametrize(
    ("figures", "advice"),
    [
        ({"reliability": 0.4}, "choose"),
        (MANY, "choose"),
        (NARROW, "choose"),  # of a budget that it spends
        (MANY | FEWEST | {"num_chosen": 24}, "draw"),
        (MANY | FEWEST | {"num_chosen": 25}, "choose"),
        (MANY | FEWEST | {"num_chosen": 24, "num_groups": 48}, "choose"),  # no more candidates than that
        (MANY | FEWEST | {"num_chosen": 1, "unspent": None}, "choose"),  # rows
        (NARROW | {"num_drawn": 9}, "fill"),
        ({"reliability": 0.91, "num_drawn": 9}, "fill"),
        ({"reliability": 0.03, "directions": 62.0, "candidate_directions": 14.0}, "draw"),
        ({"reliability": -0.2}, "draw"),
        ({"reliability": 0.03, "status": "drawn"}, "drawn"),
        ({"reliability": 0.4, "status": "drawn", "drawn_for_empty_choice": True}, "drawn"),
        ({"reliability": 0.9, "num_drawn": 9, "lora_from": 100, "budget": 100}, "lora"),
        ({"reliability": 0.03, "lora_from": 100, "budget": 101}, "lora"),
        ({"reliability": 0.9, "num_drawn": 9, "lora_from": 100, "budget": 99}, "fill"),
        ({"reliability": 0.4, "lora_from": 100}, "choose"),
        (MANY | {"num_chosen": 5, "unspent": 5}, "choose"),
        (MANY | {"num_chosen": 5, "unspent": 6}, "draw"),
        (MANY | {"num_chosen": 5, "unspent": 0, "num_drawn": 6}, "fill"),
        (MANY | {"num_chosen": 11, "unspent": 0}, "choose"),
    ],
)
def test_advice(figures, advice):
    verdict = verdict_of(Choice(**figures))
    assert verdict.advice == advice
    start = {
        "choose": "choosing is at least as good",
        "draw": "a random draw is at least as good",
        "fill": "filled up with a random draw, the choice is at least as good",
        "drawn": "a random draw was taken",
        "lora": "LoRA (method: lora) has lower losses",
    }
    assert verdict.text.startswith(start[advice])


def test_the_reason_has_the_figures():
    said = verdict_of(Choice(reliability=0.912, directions=4.6, candidate_directions=78.3)).reason
    assert said == (
        "reliability of the slopes 0.91 of 1; the chosen parameters change the outputs in 5 directions, a draw in 78"
    )
    left = verdict_of(Choice(**MANY, num_chosen=2, unspent=8)).reason
    assert left.endswith("18 directions, a draw in 29; most of the budget is left")
    fewest = verdict_of(Choice(**MANY, **FEWEST, num_chosen=2)).reason
    assert fewest.endswith("18 directions, a draw in 29; most of what auto allows is left")
    assert verdict_of(Choice(reliability=0.4)).reason == "reliability of the slopes 0.40 of 1"
    uncounted = verdict_of(Choice(reliability=0.4, num_drawn=8)).reason
    assert uncounted == "reliability of the slopes 0.40 of 1; the directions of the chosen parameters were not counted"
    noise = "reliability of the slopes 0.03 of 1, so they are mostly noise"
    assert verdict_of(Choice(reliability=0.03)).reason == noise
    said = verdict_of(Choice(reliability=0.03, lora_from=1200, budget=1200)).reason
    assert said == f"it is advised from 1,200 parameters on; {noise}"


def test_without_slopes_there_is_none():
    assert verdict_of(Choice(directions=3.0, candidate_directions=4.0)) is None
