"""BitFit: the bias terms."""

from __future__ import annotations

import numpy as np

from adapeft.choose.knapsack import parts_of
from adapeft.errors import AdapeftError
from adapeft.measure.groups import Groups
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.method import Plan, UnmeasuredMethod
from adapeft.methods.bitfit.options import BitFitOptions
from adapeft.ranks import Ranks
from adapeft.subset.subset import Subset


class BitFit(UnmeasuredMethod[BitFitOptions]):
    """All bias terms, including those of LayerNorms, and the head. A budget below their number is refused.

    Ben Zaken, Goldberg and Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models", ACL 2022.
    """

    options = BitFitOptions
    family = "rule"
    summary = "the bias terms"
    source = "Ben Zaken et al. 2022"

    def check(self, groups: Groups, budget: int, settings: BitFitOptions) -> None:
        biases = int(groups.counts[_is_bias(groups)].sum())
        if not biases:
            raise AdapeftError(
                "select.method = bitfit: no candidate is a bias. The model has none, or select.include and "
                "select.exclude leave none. Use another method, or admit biases."
            )
        if biases > budget:
            raise AdapeftError(
                f"select.budget is {budget:,} parameters, but bitfit trains all {biases:,} bias terms. Raise the "
                f"budget to {biases}, or narrow select.include."
            )

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[BitFitOptions], ranks: Ranks) -> Subset:
        chosen = _is_bias(groups)
        return Subset(parts_of(groups, chosen)).described(
            status="rule", num_groups=groups.num_groups, num_chosen=int(chosen.sum())
        )


def _is_bias(groups: Groups) -> np.ndarray:
    """Return whether each group is a bias, bool [K]; requires ``tensor`` granularity."""
    return np.array([info.name.rpartition(".")[2] == "bias" for info in groups.parameters], dtype=bool)
