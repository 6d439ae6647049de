"""ChildTuning-F: all candidates, with gradients that are masked at random in each step."""

from adapeft.methods.base.rule_method import RuleMethod
from adapeft.methods.child_tuning_f.options import ChildTuningFOptions
from adapeft.methods.child_tuning_f.rule import ChildTuningFRule


class ChildTuningF(RuleMethod[ChildTuningFOptions]):
    """The task-free variant of Xu et al., "Raise a Child in Large Language Model", EMNLP 2021."""

    options = ChildTuningFOptions
    rule = ChildTuningFRule
    family = "projection"
    summary = "everything, a random draw of gradients in each step"
    source = "Xu et al. 2021"
    is_budgeted = False
