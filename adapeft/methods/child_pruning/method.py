"""ChildPruning: all candidates, projected every few steps onto the elements that moved most."""

from adapeft.methods.base.rule_method import RuleMethod
from adapeft.methods.child_pruning.options import ChildPruningOptions
from adapeft.methods.child_pruning.rule import ChildPruningRule


class ChildPruning(RuleMethod[ChildPruningOptions]):
    """Fu et al., "On the Effectiveness of Parameter-Efficient Fine-Tuning", AAAI 2023."""

    options = ChildPruningOptions
    rule = ChildPruningRule
    family = "projection"
    summary = "elements that moved most, projected every few steps"
    source = "Fu et al. 2023"
