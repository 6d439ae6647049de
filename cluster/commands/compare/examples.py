"""Parts of a config's training data, written as separate files."""

from __future__ import annotations

from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import Dataset

from adapeft.config.config import Config
from adapeft.data.sources import quiet, rows_of
from adapeft.errors import AdapeftError
from adapeft.files.artifact import save
from cluster.commands.compare.run import with_values


def held_out(config: Config, fraction: float, folder: Path) -> Config:
    """Return the config trained without a random part of the training data and evaluated on that part."""
    rows = _training_rows(config)
    parts = rows.train_test_split(test_size=fraction, seed=config.seed)
    train, evaluation = (_written(parts[name], folder, f"sweep-{name}") for name in ("train", "test"))
    return with_values(config, "data", train=str(train), evaluation=str(evaluation))


def perturbed(config: Config, fraction: float, seed: int, folder: Path) -> Config:
    """Return the config without a random part of the training data, as in Table 2 of Fu et al. 2023."""
    if not fraction:
        return config
    rows = _training_rows(config)
    kept = np.random.default_rng([seed, 5]).permutation(len(rows))[round(fraction * len(rows)) :]
    path = _written(rows.select(np.sort(kept)), folder, f"seed-{seed}-without-{fraction:g}")
    return with_values(config, "data", train=str(path))


def _training_rows(config: Config) -> Dataset:
    if config.data.is_streamed:
        raise AdapeftError(
            "data.streaming = true: to leave out a part of data.train, compare has to read all of it. Set "
            "data.streaming: false, or leave out perturb and give one learning rate."
        )
    return rows_of(config.data, "data.train")


def _written(rows: Dataset, folder: Path, name: str) -> Path:
    """Write ``rows`` to a Parquet file, which keeps types and class names, and return its path.

    The name contains a hash of the content, so that a run on other data is another run.
    """
    content = BytesIO()
    with quiet():
        rows.to_parquet(content)
    path = folder / f"{name}-{sha256(content.getvalue()).hexdigest()[:12]}.parquet"
    if not path.is_file():
        save(path, lambda temporary: temporary.write_bytes(content.getvalue()))
    return path
