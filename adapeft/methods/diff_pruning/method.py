"""DiffPruning: all differences times learned gates, then only the largest differences."""

from adapeft.methods.base.rule_method import RuleMethod
from adapeft.methods.diff_pruning.options import DiffPruningOptions
from adapeft.methods.diff_pruning.rule import DiffPruningRule


class DiffPruning(RuleMethod[DiffPruningOptions]):
    """Guo et al., "Parameter-Efficient Transfer Learning with Diff Pruning", ACL 2021."""

    options = DiffPruningOptions
    rule = DiffPruningRule
    family = "projection"
    summary = "elements of largest gated difference, projected once"
    source = "Guo et al. 2021"
