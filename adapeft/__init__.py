"""Measure which parameters of a transformer are worth training, choose them under a budget, train only those.

The library runs in one process, with any training script, without Ray and DeepSpeed:

    subset = adapeft.select(model, batches, budget="0.5%")
    model = adapeft.attach(model, subset)  # then any trainer
    adapeft.delta(model).save("delta.safetensors")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adapeft.installation import check_not_shadowed

if TYPE_CHECKING:
    from adapeft.deltas.arithmetic import difference, interpolation, scaled, sum_of
    from adapeft.deltas.conflict import conflict_of
    from adapeft.deltas.delta import Delta
    from adapeft.deltas.extract import extract_delta as delta
    from adapeft.deltas.merge import merge
    from adapeft.deltas.swap import Deltas
    from adapeft.errors import AdapeftError
    from adapeft.formats.peft.folder import save_for_peft
    from adapeft.formats.peft.reader import load_from_peft
    from adapeft.formats.unfrozen import unfrozen_parameters
    from adapeft.selection.select import select
    from adapeft.subset.subset import Subset
    from adapeft.subset.verdict import verdict_of
    from adapeft.tune.attach import attach, detach
    from adapeft.tune.base import base
    from adapeft.tune.follow import follow_rule
    from adapeft.tune.head_rate import head_learning_rate
    from adapeft.tune.parameter_groups import parameter_groups

__version__ = "0.1.0"

# Loaded on first use, so that `adapeft config` and `import adapeft` do not wait for torch.
_EXPORTS = {
    "AdapeftError": ("adapeft.errors", "AdapeftError"),
    "Delta": ("adapeft.deltas.delta", "Delta"),
    "Deltas": ("adapeft.deltas.swap", "Deltas"),
    "Subset": ("adapeft.subset.subset", "Subset"),
    "attach": ("adapeft.tune.attach", "attach"),
    "base": ("adapeft.tune.base", "base"),
    "conflict_of": ("adapeft.deltas.conflict", "conflict_of"),
    "delta": ("adapeft.deltas.extract", "extract_delta"),
    "detach": ("adapeft.tune.attach", "detach"),
    "difference": ("adapeft.deltas.arithmetic", "difference"),
    "follow_rule": ("adapeft.tune.follow", "follow_rule"),
    "head_learning_rate": ("adapeft.tune.head_rate", "head_learning_rate"),
    "interpolation": ("adapeft.deltas.arithmetic", "interpolation"),
    "load_from_peft": ("adapeft.formats.peft.reader", "load_from_peft"),
    "merge": ("adapeft.deltas.merge", "merge"),
    "parameter_groups": ("adapeft.tune.parameter_groups", "parameter_groups"),
    "save_for_peft": ("adapeft.formats.peft.folder", "save_for_peft"),
    "scaled": ("adapeft.deltas.arithmetic", "scaled"),
    "select": ("adapeft.selection.select", "select"),
    "sum_of": ("adapeft.deltas.arithmetic", "sum_of"),
    "unfrozen_parameters": ("adapeft.formats.unfrozen", "unfrozen_parameters"),
    "verdict_of": ("adapeft.subset.verdict", "verdict_of"),
}
__all__ = [
    "AdapeftError",
    "Delta",
    "Deltas",
    "Subset",
    "attach",
    "base",
    "conflict_of",
    "delta",
    "detach",
    "difference",
    "follow_rule",
    "head_learning_rate",
    "interpolation",
    "load_from_peft",
    "merge",
    "parameter_groups",
    "save_for_peft",
    "scaled",
    "select",
    "sum_of",
    "unfrozen_parameters",
    "verdict_of",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'adapeft' has no attribute {name!r}")
    check_not_shadowed("solver")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module), attribute)
