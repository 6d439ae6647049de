"""Methods: each a file of a few lines that composes the stages."""

from adapeft.errors import AdapeftError, did_you_mean
from adapeft.methods.adapeft import AdaPEFT
from adapeft.methods.adapter import Adapters
from adapeft.methods.base.method import Method, Plan, ValuedMethod
from adapeft.methods.base.rule_method import RuleMethod
from adapeft.methods.bitfit import BitFit
from adapeft.methods.child_pruning.method import ChildPruning
from adapeft.methods.child_tuning.d import ChildTuningD
from adapeft.methods.child_tuning.f import ChildTuningF
from adapeft.methods.diff_pruning.method import DiffPruning
from adapeft.methods.fish import Fish
from adapeft.methods.full import Full
from adapeft.methods.lora import LoRA
from adapeft.methods.magnitude import Magnitude
from adapeft.methods.mixout.method import Mixout, MixoutReset
from adapeft.methods.random import Random
from adapeft.methods.sam import SAM

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(Full(), Random(), Mixout(), MixoutReset(), BitFit(), LoRA(), Adapters(), Magnitude()),
        *(DiffPruning(), ChildTuningF(), ChildTuningD(), ChildPruning()),
        *(Fish(), SAM(), AdaPEFT()),
    )
}


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        AdapeftError: there is none.
    """
    if name not in METHODS:
        raise AdapeftError(
            f"select.method = {name!r}: no such method.{did_you_mean(name, METHODS)} There are {', '.join(METHODS)}."
        )
    return METHODS[name]


__all__ = ["METHODS", "Method", "Plan", "RuleMethod", "ValuedMethod", "get_method"]
