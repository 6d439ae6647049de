"""ChildPruning: everything, projected every few steps onto what moved most."""

from adapeft.methods.base.rule_method import RuleMethod


class ChildPruning(RuleMethod):
    """Fu et al., "On the Effectiveness of Parameter-Efficient Fine-Tuning", AAAI 2023."""

    name = "child-pruning"
    family = "projection"
    summary = "elements that moved most, projected every few steps"
    source = "Fu et al. 2023"
