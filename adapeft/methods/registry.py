"""The registry of methods. ``adapeft.methods.options`` lists their options for the config."""

from typing import Any

from adapeft.errors import AdapeftError, did_you_mean
from adapeft.methods.adapeft.method import AdaPEFT
from adapeft.methods.adapter.method import Adapters
from adapeft.methods.base.method import Method, Plan, ValuedMethod
from adapeft.methods.base.rule_method import RuleMethod
from adapeft.methods.bitfit.method import BitFit
from adapeft.methods.child_pruning.method import ChildPruning
from adapeft.methods.child_tuning_d.method import ChildTuningD
from adapeft.methods.child_tuning_f.method import ChildTuningF
from adapeft.methods.diff_pruning.method import DiffPruning
from adapeft.methods.fish.method import Fish
from adapeft.methods.full.method import Full
from adapeft.methods.lora.method import LoRA
from adapeft.methods.magnitude.method import Magnitude
from adapeft.methods.mixout.method import Mixout, MixoutReset
from adapeft.methods.random.method import Random
from adapeft.methods.sam.method import SAM
from adapeft.methods.snip.method import SNIP

METHODS: dict[str, Method[Any]] = {
    method.name: method
    for method in (
        *(Full(), Random(), Mixout(), MixoutReset(), BitFit(), LoRA(), Adapters(), Magnitude()),
        *(DiffPruning(), ChildTuningF(), ChildTuningD(), ChildPruning()),
        *(SNIP(), Fish(), SAM(), AdaPEFT()),
    )
}


def get_method(name: str) -> Method[Any]:
    """Return the method of this name.

    Raises:
        AdapeftError: there is no such method.
    """
    if name not in METHODS:
        raise AdapeftError(
            f"select.method = {name!r}: no such method.{did_you_mean(name, METHODS)} Methods: {', '.join(METHODS)}."
        )
    return METHODS[name]


__all__ = ["METHODS", "Method", "Plan", "RuleMethod", "ValuedMethod", "get_method"]
