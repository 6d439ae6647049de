"""The learning rate that a sweep has found for a method and budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from adapeft.files.artifact import save_json
from adapeft.files.damage import load_json, reading

WORST = (-math.inf, -math.inf)
_NONE: Mapping[float, int] = MappingProxyType({})


class Swept(NamedTuple):
    """Result of a sweep for a method and budget.

    Attributes:
        rate: best learning rate.
        scores: learning rate → score, for all that were tried; not finite where there was none.
        failure: reason why even this rate led to no score, or None.
        seconds: seconds of all its runs.
        stopped: learning rate → step at which its run was stopped, whose score is that of this step.
    """

    rate: float
    scores: Mapping[float, float]
    failure: str | None = None
    seconds: float = 0.0
    stopped: Mapping[float, int] = _NONE


def value_of(scores: Mapping[str, float], metric: str, higher_is_better: bool) -> tuple[float, float]:
    """Return what a sweep compares: the score and, where scores are equal, the loss; larger is better."""
    values = scores[metric] * (1 if higher_is_better else -1), -scores["loss"]
    # A comparison with the NaN of a diverged training is never true, which would end a climb there.
    return values if all(map(math.isfinite, values)) else WORST


def save_swept(path: Path, swept: Swept, runs: Mapping[float, str]) -> None:
    """Write the result of a sweep, and the identities of its runs by learning rate."""
    tried = [
        {
            "learning_rate": rate,
            "run": runs[rate],
            "score": score if math.isfinite(score) else None,
            "stopped_step": swept.stopped.get(rate),
        }
        for rate, score in swept.scores.items()
    ]
    save_json(path, {"best": swept.rate, "tried": tried, "seconds": swept.seconds})


def load_swept(path: Path, runs: Mapping[float, str]) -> Swept | None:
    """Return the result of a sweep of exactly these runs; None if there is none.

    Raises:
        AdapeftError: the file is damaged.
    """
    if not path.is_file():
        return None
    remedy = "Remove it, and run the command again."
    content = load_json(path, "the result of a sweep", remedy)
    with reading(f"{path}: damaged", remedy):
        tried = {float(one["learning_rate"]): one for one in content["tried"]}
        if {rate: one["run"] for rate, one in tried.items()} != runs:
            return None
        scores = {rate: math.nan if one["score"] is None else float(one["score"]) for rate, one in tried.items()}
        steps = {rate: one["stopped_step"] for rate, one in tried.items() if one["stopped_step"] is not None}
        return Swept(float(content["best"]), scores, None, float(content["seconds"]), steps)
