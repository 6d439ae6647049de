"""The config's ``data`` section as a union over tasks, discriminated by ``model.task``, a key of another section."""

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
"""Name of a task → its ``data`` section."""


class _OfTask(dict[str, Any]):
    """The raw ``data`` section of a config with the task that reads it."""

    def __init__(self, keys: Mapping[str, Any], task: str) -> None:
        super().__init__(keys)
        self.task = task


def _of_task(given: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """Validate the section with only the keys of its task.

    Older versions took the same keys for every task and wrote all of them into run folders. There, keys that the task
    never read are ignored, whatever their values; elsewhere they are ignored only at their old defaults.
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
    """Return the task named in an otherwise invalid ``model`` section, else the first that has most of the keys."""
    model = (tree or {}).get("model")
    if isinstance(model, Mapping) and isinstance(model.get("task"), str) and model["task"] in DATA:
        return model["task"]
    return max(DATA, key=lambda task: len(keys.keys() & DATA[task].model_fields.keys()))


def _tag(given: Any) -> str:
    """Return the task of a ``data`` section; for any other value the first task, whose validation reports the error."""
    return given.task if isinstance(given, _OfTask | Data) else next(iter(DATA))


if TYPE_CHECKING:
    AnyData = Data
else:
    AnyData = Annotated[
        reduce(or_, (Annotated[data, Tag(name)] for name, data in DATA.items())),
        Discriminator(_tag),
        WrapValidator(_of_task),
    ]
