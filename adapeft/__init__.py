"""Measure which parameters of a transformer are worth training, choose them under a budget, train only those.

The library face: one process, any training script, no Ray and no DeepSpeed::

    subset = adapeft.select(model, batches, budget="0.5%")
    model = adapeft.attach(model, subset)  # then any trainer
    adapeft.delta(model).save("delta.safetensors")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapeft.choose.select import select
    from adapeft.choose.subset import Subset
    from adapeft.errors import AdapeftError
    from adapeft.ship.arithmetic import difference, interpolation, scaled, sum_of
    from adapeft.ship.conflict import conflict_of
    from adapeft.ship.delta import Delta
    from adapeft.ship.delta import extract_delta as delta
    from adapeft.ship.merge import merge
    from adapeft.ship.peft_folder import save_for_peft
    from adapeft.ship.peft_import import load_from_peft
    from adapeft.ship.swap import Deltas
    from adapeft.ship.unfrozen import unfrozen_parameters
    from adapeft.tune.attach import attach, detach
    from adapeft.tune.follow import follow_rule
    from adapeft.tune.parameter_groups import parameter_groups

__version__ = "0.1.0"

# Loaded on first use, so that `adapeft config` and `import adapeft` do not wait for torch.
_EXPORTS = {
    "AdapeftError": ("adapeft.errors", "AdapeftError"),
    "Delta": ("adapeft.ship.delta", "Delta"),
    "Deltas": ("adapeft.ship.swap", "Deltas"),
    "Subset": ("adapeft.choose.subset", "Subset"),
    "attach": ("adapeft.tune.attach", "attach"),
    "conflict_of": ("adapeft.ship.conflict", "conflict_of"),
    "delta": ("adapeft.ship.delta", "extract_delta"),
    "detach": ("adapeft.tune.attach", "detach"),
    "difference": ("adapeft.ship.arithmetic", "difference"),
    "follow_rule": ("adapeft.tune.follow", "follow_rule"),
    "interpolation": ("adapeft.ship.arithmetic", "interpolation"),
    "load_from_peft": ("adapeft.ship.peft_import", "load_from_peft"),
    "merge": ("adapeft.ship.merge", "merge"),
    "parameter_groups": ("adapeft.tune.parameter_groups", "parameter_groups"),
    "save_for_peft": ("adapeft.ship.peft_folder", "save_for_peft"),
    "scaled": ("adapeft.ship.arithmetic", "scaled"),
    "select": ("adapeft.choose.select", "select"),
    "sum_of": ("adapeft.ship.arithmetic", "sum_of"),
    "unfrozen_parameters": ("adapeft.ship.unfrozen", "unfrozen_parameters"),
}
__all__ = [
    "AdapeftError",
    "Delta",
    "Deltas",
    "Subset",
    "attach",
    "conflict_of",
    "delta",
    "detach",
    "difference",
    "follow_rule",
    "interpolation",
    "load_from_peft",
    "merge",
    "parameter_groups",
    "save_for_peft",
    "scaled",
    "select",
    "sum_of",
    "unfrozen_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'adapeft' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module), attribute)
