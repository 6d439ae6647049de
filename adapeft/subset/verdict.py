"""The verdict on a choice: whether it can be expected to beat a uniform draw, from its measurement, or LoRA."""

from __future__ import annotations

from typing import Literal, NamedTuple

from adapeft.sections.budget import DEFAULT_BUDGET
from adapeft.subset.choice import Choice

_NOISE = 0.25
"""Between CoLA, 0.03 to 0.21 over five seeds, and RTE and MRPC, 0.28 to 0.46."""
_MOST = 1 / 2
"""Share of a budget that a choice takes below which a draw of all of it can be expected to be as good."""

_ADVICE = {
    "choose": "choosing is at least as good as a random draw",
    "draw": "a random draw is at least as good as choosing",
    "fill": "filled up with a random draw, the choice is at least as good as one",
    "drawn": "a random draw was taken, because a choice cannot be expected to be better",
    "lora": "LoRA (method: lora) has lower losses on language models",
}


class Verdict(NamedTuple):
    """The advice, and the reason for it in a sentence."""

    advice: Literal["choose", "draw", "fill", "drawn", "lora"]
    reason: str

    @property
    def text(self) -> str:
        """The verdict in one line."""
        return f"{_ADVICE[self.advice]}: {self.reason}"


def verdict_of(choice: Choice) -> Verdict | None:
    """Return the verdict on a choice; None if its slopes were not measured.

    LoRA is advised for language models wherever the budget holds as much of it as was tried. A draw is advised, or
    taken, where the slopes are noise, and where a choice that is not filled up leaves most of its budget, so that
    training soon has nothing left to lower. tests/benchmarks/results/verdict.md has the figures.
    """
    if choice.reliability is None:
        return None
    found = _of_measurement(choice, f"reliability of the slopes {choice.reliability:.2f} of 1")
    if choice.lora_from is not None and choice.budget is not None and choice.lora_from <= choice.budget:
        return Verdict("lora", f"it is advised from {choice.lora_from:,} parameters on; {found.reason}")
    return found


def _of_measurement(choice: Choice, held: str) -> Verdict:
    if is_noise(choice.reliability):
        return Verdict("drawn" if choice.is_drawn else "draw", f"{held}, so they are mostly noise")
    if choice.is_drawn:
        return Verdict("drawn", f"{held}, and no candidate promises a lower loss")
    reason = f"{held}{_spanned(choice)}"
    if choice.num_drawn:
        return Verdict("fill", reason)
    if choice.unspent is not None and choice.needed("num_chosen") < _MOST * _budget_of(choice):
        whole = "the budget" if choice.share is None else "what auto allows"
        return Verdict("draw", f"{reason}; most of {whole} is left")
    return Verdict("choose", reason)


def _spanned(choice: Choice) -> str:
    if choice.directions is None or choice.candidate_directions is None:
        return "; the directions of the chosen parameters were not counted" if choice.num_drawn else ""
    return (
        f"; the chosen parameters change the outputs in {choice.directions:.0f} directions, a draw in "
        f"{choice.candidate_directions:.0f}"
    )


def is_noise(reliability: float | None) -> bool:
    """Whether slopes of this reliability are noise, so that they cannot tell how many parameters suffice."""
    return reliability is not None and reliability < _NOISE


def is_drawn_for_noise(choice: Choice) -> bool:
    """Whether a draw was taken because the slopes are noise."""
    return choice.is_drawn and is_noise(choice.reliability)


def _budget_of(choice: Choice) -> int:
    """Return the elements that a joint choice of single ones might have taken, with ``budget: auto`` the most."""
    if choice.share is not None:
        return min(DEFAULT_BUDGET.count(int(choice.needed("num_total"))), int(choice.needed("num_groups")))
    return int(choice.needed("num_chosen") + choice.needed("unspent"))
