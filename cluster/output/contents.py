"""Content hashes of the inputs that a config names: data, base model, saved subset, statistics of another run."""

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
    """Return key of the config → hash of the content at its place. Reads the whole base once, at memory speed.

    Args:
        config: config of the run.
        description: description of its data.
    """
    return {**_inputs_of(config.model, description), **_chosen_from(config)}


class KnownContents:
    """``contents_of`` for the configs of one comparison, reading each data set and base model only once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Data, Model], dict[str, str]] = {}
        self._lock = Lock()

    def __call__(self, config: Config) -> dict[str, str]:
        """Return the hashes; a saved subset or statistics to choose from belong to one run and are read every time."""
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
