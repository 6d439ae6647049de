"""What the places that a config names hold, hashed: the data, the base model, a saved subset, other statistics."""

from __future__ import annotations

from adapeft.choose.locate import locate
from adapeft.config import Config
from adapeft.inputs.content import file_hash, model_hash
from adapeft.inputs.data import DataDescription
from adapeft.measure.storage import TABLE
from cluster.mirror import fetched


def contents_of(config: Config, description: DataDescription) -> dict[str, str]:
    """Key of the config → hash of what its place holds. Reads the whole base once, at the speed of memory.

    Args:
        config: of the run.
        description: of its data, which was read for it.
    """
    contents = {**description.content, "model.name": model_hash(config.model.name, config.model.revision)}
    if config.train.subset is not None:
        contents["train.subset"] = file_hash(locate(config.train.subset))
    elif config.select.statistics is not None:
        table = fetched(config.select.statistics, (TABLE,)) / TABLE
        if table.is_file():  # a run that has chosen no longer needs it
            contents["select.statistics"] = file_hash(table)
    return contents
