"""The rule under which a subset is trained."""

from __future__ import annotations

from collections.abc import Mapping

from adapeft.errors import AdapeftError
from adapeft.files.damage import reading
from adapeft.methods.base.rule import FixedMask
from adapeft.methods.registry import METHODS, RuleMethod
from adapeft.parts.rule import Rule
from adapeft.subset.subset import Subset


def rule_of(subset: Subset) -> Rule:
    """Create the rule of ``subset``, at step 0; a ``FixedMask`` if it has no dense parts.

    Raises:
        AdapeftError: the subset's dense parts have no rule, or one that this version does not support.
    """
    if not any(part.follows_rule for part in subset.parts.values()):
        return FixedMask()
    said = subset.choice.rule
    method = METHODS.get(str(said.get("method"))) if isinstance(said, Mapping) else None
    if not (isinstance(said, Mapping) and isinstance(method, RuleMethod)):
        raise AdapeftError(f"the rule of the subset's dense parts is missing or unknown ({said}). Choose again.")
    with reading(f"the rule of the subset's dense parts is damaged ({said})", "Choose again."):
        options = method.options.model_validate({**said["options"], "method": method.name})
        return method.rule(options, said["seed"], said["budget"])
