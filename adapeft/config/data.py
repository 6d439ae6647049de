"""The config's ``data`` as a union over the task, which ``model.task`` names: another section decides."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator

from adapeft.model.section import Model
from adapeft.sections.data import Data
from adapeft.tasks.registry import TASKS

DATA: dict[str, type[Data]] = {name: task.data for name, task in TASKS.items()}
"""Name of a task → the keys that it reads."""


class _OfTask(dict[str, Any]):
    """What a config says of ``data``, with the task that reads it."""

    def __init__(self, keys: Mapping[str, Any], task: str) -> None:
        super().__init__(keys)
        self.task = task


def _of_task(given: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """The section with the keys of its task alone.

    Older versions took the same keys for every task and wrote all of them into run folders: there, keys that the task
    never read say nothing. Elsewhere only their old defaults do.
    """
    keys = given.model_dump() if isinstance(given, Data) else given
    model: Model | None = info.data.get("model")
    if not isinstance(keys, Mapping):
        return handler(keys)
    task = _most_likely(keys, info.context) if model is None else model.task
    unread = DATA[task].formerly
    is_older = keys.keys() >= unread.keys()
    left = {key: value for key, value in keys.items() if key not in unread or not (is_older or value == unread[key])}
    return handler(_OfTask(left, task))


def _most_likely(keys: Mapping[str, Any], tree: Mapping[Any, Any] | None) -> str:
    """The task that a ``model`` section with other mistakes names; without it the first that knows most of the keys."""
    model = (tree or {}).get("model")
    if isinstance(model, Mapping) and isinstance(model.get("task"), str) and model["task"] in DATA:
        return model["task"]
    return max(DATA, key=lambda task: len(keys.keys() & DATA[task].model_fields.keys()))


def _tag(given: Any) -> str:
    """The task whose keys are ``given``; what is no section at all goes to any task, which says so."""
    return given.task if isinstance(given, _OfTask | Data) else next(iter(DATA))


if TYPE_CHECKING:
    AnyData = Data
else:
    AnyData = Annotated[
        reduce(or_, (Annotated[data, Tag(name)] for name, data in DATA.items())),
        Discriminator(_tag),
        WrapValidator(_of_task),
    ]
