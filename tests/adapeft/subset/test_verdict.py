"""The verdict on a choice."""

from __future__ import annotations

import pytest

from adapeft.subset.choice import Choice
from adapeft.subset.verdict import verdict_of

MANY = {"reliability": 0.4, "directions": 18.0, "candidate_directions": 29.0}


@pytest.mark.parametrize(
    ("figures", "advice"),
    [
        ({"reliability": 0.4}, "choose"),
        ({"reliability": 0.4, "directions": 18.0, "candidate_directions": 29.0}, "choose"),
        ({"reliability": 0.91, "directions": 4.6, "candidate_directions": 78.0}, "draw"),
        ({"reliability": 0.90, "directions": 16.0, "candidate_directions": 56.0}, "draw"),
        ({"reliability": 0.91, "directions": 4.6, "candidate_directions": 78.0, "num_drawn": 9}, "fill"),
        ({"reliability": 0.91, "num_drawn": 9}, "fill"),
        ({"reliability": 0.03, "directions": 62.0, "candidate_directions": 14.0}, "draw"),
        ({"reliability": -0.2}, "draw"),
        ({"reliability": 0.03, "status": "drawn"}, "drawn"),
        ({"reliability": 0.4, "status": "drawn", "drawn_for_empty_choice": True}, "drawn"),
        ({"reliability": 0.9, "num_drawn": 9, "lora_from": 100, "budget": 100}, "lora"),
        ({"reliability": 0.03, "lora_from": 100, "budget": 101}, "lora"),
        ({"reliability": 0.9, "num_drawn": 9, "lora_from": 100, "budget": 99}, "fill"),
        ({"reliability": 0.4, "lora_from": 100}, "choose"),
        (MANY | {"num_chosen": 2, "unspent": 7, "num_total": 1000}, "choose"),
        (MANY | {"num_chosen": 2, "unspent": 8, "num_total": 1000}, "draw"),
        (MANY | {"num_chosen": 2, "unspent": 0, "num_drawn": 8, "num_total": 1000}, "fill"),
        (MANY | {"num_chosen": 10, "unspent": 0, "num_total": 1000}, "choose"),
    ],
)
def test_advice(figures, advice):
    verdict = verdict_of(Choice(**figures))
    assert verdict.advice == advice
    start = {
        "choose": "choosing is at least as good",
        "draw": "a random draw is at least as good",
        "fill": "a random draw was added",
        "drawn": "a random draw was taken",
        "lora": "LoRA (method: lora) has lower losses",
    }
    assert verdict.text.startswith(start[advice])


def test_the_reason_has_the_figures():
    said = verdict_of(Choice(reliability=0.912, directions=4.6, candidate_directions=78.3)).reason
    assert said == (
        "reliability of the slopes 0.91 of 1; the chosen parameters change the outputs in 5 directions, a draw in 78"
    )
    wide = Choice(**MANY, num_chosen=2, unspent=0, num_drawn=8, num_total=1000)
    assert verdict_of(wide).reason.endswith(
        "18 directions, a draw in 29; they leave a part of a budget of 1% of the model or more"
    )
    noise = "reliability of the slopes 0.03 of 1, so they are mostly noise"
    assert verdict_of(Choice(reliability=0.03)).reason == noise
    said = verdict_of(Choice(reliability=0.03, lora_from=1200, budget=1200)).reason
    assert said == f"it is advised from 1,200 parameters on; {noise}"


def test_without_slopes_there_is_none():
    assert verdict_of(Choice(directions=3.0, candidate_directions=4.0)) is None
