"""The verdict on a choice: whether it can be expected to beat a uniform draw, from its measurement, or LoRA."""

from __future__ import annotations

from typing import Literal, NamedTuple

from adapeft.subset.choice import Choice

_NOISE = 0.25
"""Between CoLA, 0.03 to 0.21 over five seeds, and RTE and MRPC, 0.28 to 0.46."""
FEW = 1 / 3
"""Share of the directions of all candidates below which a choice is narrow."""
_WIDE = 0.01
"""Share of the model from which on a budget is spent. What the choice for STS-B takes, 0.01 %, is level with a draw of
0.5 %, and behind one of 2 % by 0.014 ± 0.004."""

_ADVICE = {
    "choose": "choosing is at least as good as a random draw",
    "draw": "a random draw is at least as good as choosing",
    "fill": "a random draw was added, because the chosen parameters alone may be too few",
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
    taken, where the slopes are noise; it is advised, or added, where the chosen parameters may be too few: they change
    the outputs in less than a third of the directions of all candidates, which a draw shares, so that training soon has
    nothing left to lower, or leave a part of a budget of a hundredth of the model or more.
    tests/benchmarks/results/verdict.md has the figures.
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
    if choice.directions is None or choice.candidate_directions is None:
        if choice.num_drawn:
            return Verdict("fill", f"{held}; their directions were not counted")
        return Verdict("choose", held)
    spanned = (
        f"the chosen parameters change the outputs in {choice.directions:.0f} directions, a draw in "
        f"{choice.candidate_directions:.0f}"
    )
    if not is_too_few(choice):
        return Verdict("choose", f"{held}; {spanned}")
    left = "" if _is_narrow(choice) else f"; they leave a part of a budget of {_WIDE:.0%} of the model or more"
    return Verdict("fill" if choice.num_drawn else "draw", f"{held}; {spanned}{left}")


def is_noise(reliability: float | None) -> bool:
    """Whether slopes of this reliability are noise, so that they cannot tell how many parameters suffice."""
    return reliability is not None and reliability < _NOISE


def is_drawn_for_noise(choice: Choice) -> bool:
    """Whether a draw was taken because the slopes are noise."""
    return choice.is_drawn and is_noise(choice.reliability)


def is_too_few(choice: Choice) -> bool:
    """Whether the chosen parameters may be too few: they have few directions, or leave a part of a wide budget."""
    return _is_narrow(choice) or _leaves_wide_budget(choice)


def _is_narrow(choice: Choice) -> bool:
    """Whether the chosen parameters change the outputs in less than a third of the directions of all candidates."""
    if choice.directions is None or choice.candidate_directions is None:
        return False
    return choice.directions < FEW * choice.candidate_directions


def _leaves_wide_budget(choice: Choice) -> bool:
    left = (choice.unspent or 0) + (choice.num_drawn or 0)
    if not left or choice.num_chosen is None or choice.num_total is None:
        return False
    return choice.num_chosen + left >= _WIDE * choice.num_total
