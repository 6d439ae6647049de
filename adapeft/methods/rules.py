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
    record = subset.choice.rule
    method = METHODS.get(str(record.get("method"))) if isinstance(record, Mapping) else None
    if not (isinstance(record, Mapping) and isinstance(method, RuleMethod)):
        raise AdapeftError(f"the rule of the subset's dense parts is missing or unknown ({record}). Choose again.")
    with reading(f"the rule of the subset's dense parts is damaged ({record})", "Choose again."):
        options = method.options.model_validate({**record["options"], "method": method.name})
        return method.rule(options, record["seed"], record["budget"])
