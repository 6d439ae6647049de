"""The rule that a subset was chosen for."""

from __future__ import annotations

from collections.abc import Mapping

from adapeft.errors import AdapeftError
from adapeft.methods.base.rule import FixedMask
from adapeft.methods.child_pruning.rule import ChildPruning
from adapeft.methods.child_tuning.rule import ChildTuningF
from adapeft.methods.diff_pruning.rule import DiffPruning
from adapeft.methods.mixout.rule import Mixout, MixoutReset
from adapeft.parts.rule import Rule
from adapeft.sections.rules import parse_options
from adapeft.subset.subset import Subset

RULES: dict[str, type[Rule]] = {
    "mixout": Mixout,
    "mixout-reset": MixoutReset,
    "child-tuning-f": ChildTuningF,
    "child-pruning": ChildPruning,
    "diff-pruning": DiffPruning,
}


def rule_of(subset: Subset) -> Rule:
    """A fresh rule for ``subset``, at step 0; that of a fixed mask where it has no dense parts.

    Raises:
        AdapeftError: the subset's dense parts have no rule, or one that this version does not know.
    """
    if not any(part.kind == "dense" for part in subset.parts.values()):
        return FixedMask()
    said = subset.description.get("rule")
    if not isinstance(said, Mapping) or said.get("method") not in RULES:
        raise AdapeftError(f"the subset's dense parts go with no known rule ({said}). Choose again.")
    options = parse_options(said["method"], said["options"])
    return RULES[said["method"]](options, said["seed"], said["budget"])
