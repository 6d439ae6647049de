"""DiffPruning: everything times learned gates, then the largest differences alone."""

from adapeft.methods.base.rule_method import RuleMethod


class DiffPruning(RuleMethod):
    """Guo et al., "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021."""

    name = "diff-pruning"
    family = "projection"
    summary = "elements of largest gated difference, projected once"
    source = "Guo et al. 2021"
