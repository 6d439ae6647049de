"""Parts of a config's training data, as files of their own."""

from __future__ import annotations

from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import Dataset

from adapeft.artifact import save
from adapeft.config import Config
from adapeft.inputs.data import load_rows, quiet
from cluster.compared_run import with_values


def held_out(config: Config, fraction: float, folder: Path) -> Config:
    """The config trained without a random part of the training data, and evaluated on that part."""
    rows = load_rows(config.data.train, "data.train")
    parts = rows.train_test_split(test_size=fraction, seed=config.seed)
    train, evaluation = (_written(parts[name], folder, f"sweep-{name}") for name in ("train", "test"))
    return with_values(config, "data", train=str(train), evaluation=str(evaluation))


def perturbed(config: Config, fraction: float, seed: int, folder: Path) -> Config:
    """The config with a random part of the training data left out, as Table 2 of Fu et al. 2023 does."""
    if not fraction:
        return config
    rows = load_rows(config.data.train, "data.train")
    kept = np.random.default_rng([seed, 5]).permutation(len(rows))[round(fraction * len(rows)) :]
    path = _written(rows.select(np.sort(kept)), folder, f"seed-{seed}-without-{fraction:g}")
    return with_values(config, "data", train=str(path))


def _written(rows: Dataset, folder: Path, name: str) -> Path:
    """JSON lines of ``rows``, in a file that is named by its content: runs on other data are other runs."""
    lines = BytesIO()
    with quiet():
        rows.to_json(lines, force_ascii=False)
    path = folder / f"{name}-{sha256(lines.getvalue()).hexdigest()[:12]}.jsonl"
    if not path.is_file():
        save(path, lambda temporary: temporary.write_bytes(lines.getvalue()))
    return path
