"""The options of every method, and their union, the type of a config's ``select``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Discriminator

from adapeft.methods.adapeft.options import AdaPEFTOptions
from adapeft.methods.adapter.options import AdapterOptions
from adapeft.methods.bitfit.options import BitFitOptions
from adapeft.methods.child_pruning.options import ChildPruningOptions
from adapeft.methods.child_tuning_d.options import ChildTuningDOptions
from adapeft.methods.child_tuning_f.options import ChildTuningFOptions
from adapeft.methods.diff_pruning.options import DiffPruningOptions
from adapeft.methods.fish.options import FishOptions
from adapeft.methods.full.options import FullOptions
from adapeft.methods.lora.options import LoRAOptions
from adapeft.methods.magnitude.options import MagnitudeOptions
from adapeft.methods.mixout.options import MixoutOptions, MixoutResetOptions
from adapeft.methods.random.options import RandomOptions
from adapeft.methods.sam.options import SAMOptions
from adapeft.methods.snip.options import SNIPOptions
from adapeft.sections.section import plain
from adapeft.sections.select import Select

_Union = (
    FullOptions
    | RandomOptions
    | MixoutOptions
    | MixoutResetOptions
    | BitFitOptions
    | LoRAOptions
    | AdapterOptions
    | MagnitudeOptions
    | DiffPruningOptions
    | ChildTuningFOptions
    | ChildTuningDOptions
    | ChildPruningOptions
    | SNIPOptions
    | FishOptions
    | SAMOptions
    | AdaPEFTOptions
)

OPTIONS: dict[str, type[Select]] = {options.tag(): options for options in get_args(_Union)}
"""Name of a method → class of its options."""

_IN_EVERY_OLDER_CONFIG = {"rule", "direction", "shrinkage", "joint", "placement", "lora_ranks"}
_ONCE_UNREAD = {"direction", "shrinkage", "joint"}


def of_one_method(given: object) -> object:
    """Return the section of a config with only the keys of its method.

    The method is ``adapeft`` if none is given. Keys of other methods at their defaults are removed, because the
    complete configs in older run folders have the keys of all methods. Those configs also have values for keys that
    the method accepted but did not read. Older configs have the options of rules below ``rule``.

    Raises:
        ValueError: ``rule`` is not a mapping, or has a key that all methods have or that is given twice.
    """
    if not isinstance(given, Mapping):
        return given
    is_older = given.keys() >= _IN_EVERY_OLDER_CONFIG
    tree = {"method": AdaPEFTOptions.tag(), **flat(given)}
    method = tree["method"]
    if not isinstance(method, str) or method not in OPTIONS:
        return tree
    mine = OPTIONS[method].model_fields
    return {
        key: value
        for key, value in tree.items()
        if key in mine or not (says_nothing(key, value) or (is_older and key in _ONCE_UNREAD))
    }


def flat(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the section with the options that older configs have below ``rule`` moved to the top level.

    Raises:
        ValueError: ``rule`` is not a mapping, or has a key that all methods have or that is given twice.
    """
    tree = dict(given)
    rule = tree.pop("rule", {})
    if not isinstance(rule, Mapping):
        raise ValueError(f"rule = {rule}: should be a mapping of the method's own options")
    for key, value in rule.items():
        if key in Select.model_fields:
            raise ValueError(f"rule: {key} = {value} is an option of all methods; write select.{key}")
        if key in tree:
            raise ValueError(f"rule: {key} = {value} is given a second time as select.{key}; leave one of them out")
    return {**tree, **rule}


def says_nothing(key: object, value: object) -> bool:
    """Whether the value is the default of a key that only some methods have."""
    if key in Select.model_fields:
        return False
    fields = [one.model_fields[str(key)] for one in OPTIONS.values() if key in one.model_fields]
    return any(plain(field.default) == plain(value) for field in fields)


AnyOptions = Annotated[_Union, Discriminator("method"), BeforeValidator(of_one_method)]
"""Type of ``select`` in a config: the options of its method."""
