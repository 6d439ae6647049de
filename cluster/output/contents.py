"""What the places that a config names hold, hashed: the data, the base model, a saved subset, other statistics."""

from __future__ import annotations

from threading import Lock

from adapeft.config.config import Config
from adapeft.data.content import file_hash, model_hash
from adapeft.data.description import DataDescription
from adapeft.measure.storage import TABLE
from adapeft.model.load import describe_for
from adapeft.model.section import Model
from adapeft.sections.data import Data
from adapeft.subset.locate import locate
from cluster.output.mirror import fetched


def contents_of(config: Config, description: DataDescription) -> dict[str, str]:
    """Key of the config → hash of what its place holds. Reads the whole base once, at the speed of memory.

    Args:
        config: of the run.
        description: of its data, which was read for it.
    """
    return {**_inputs_of(config.model, description), **_chosen_from(config)}


class KnownContents:
    """``contents_of`` the configs of one comparison: each data and base that they name is read once for all of them."""

    def __init__(self) -> None:
        self._known: dict[tuple[Data, Model], dict[str, str]] = {}
        self._lock = Lock()

    def __call__(self, config: Config) -> dict[str, str]:
        """The hashes; those of what a run chooses from are its own, and read anew."""
        data, model = config.data, config.model
        with self._lock:
            if (data, model) not in self._known:
                self._known[data, model] = _inputs_of(model, describe_for(model, data))
        return {**self._known[data, model], **_chosen_from(config)}


def _inputs_of(model: Model, description: DataDescription) -> dict[str, str]:
    return {**description.content, "model.name": model_hash(model.name, model.revision)}


def _chosen_from(config: Config) -> dict[str, str]:
    contents = {}
    if config.train.subset is not None:
        contents["train.subset"] = file_hash(locate(config.train.subset))
    elif config.select.statistics is not None:
        table = fetched(config.select.statistics, (TABLE,)) / TABLE
        if table.is_file():  # a run that has chosen no longer needs it
            contents["select.statistics"] = file_hash(table)
    return contents
