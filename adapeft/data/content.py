"""Hashes of what a run reads, by which it knows its data and its base again: a path may come to hold something else.

XXH3 with 128 bits, which runs at the speed of memory (4.2 GB/s in one thread of a 2-core machine, where SHA-256 has
0.6). It detects changes, not forgeries.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

_BLOCK = 1 << 24
_BATCH = 10_000
_UNREAD = (
    *(".*", "*.md", "LICENSE*", "*.log", "events.out.tfevents.*", "*.h5", "*.msgpack", "*.onnx", "*.ot"),
    *("trainer_state.json", "training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "generation_config.json"),
)
"""Files of a model's folder that no run reads; tokenizers have files of any name, so that all others count."""


def file_hash(path: Path) -> str:
    """Of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def rows_hash(rows: datasets.Dataset, columns: Sequence[str]) -> str:
    """Of the values, types and class names in ``columns`` of strings or numbers, or lists of them, none missing.

    Equal for equal values, whatever file they came from.
    """
    digest = xxhash.xxh3_128()
    for column in columns:
        digest.update(f"{rows.features[column]}\0".encode())
        for batch in rows.select_columns(column).with_format("arrow").iter(batch_size=_BATCH):
            array = batch[column].combine_chunks()
            if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
                # The values alone would not tell [1], [2] from [1, 2], [].
                digest.update(pc.list_value_length(array).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
                array = pc.list_flatten(array)
            if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
                # The characters alone would not tell 'a b', 'c' from 'a', 'b c'.
                _, offsets, characters = array.cast(pa.large_string()).buffers()
                bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
                digest.update(np.diff(bounds).tobytes())
                digest.update(memoryview(characters or b"")[bounds[0] : bounds[-1]])
            else:
                digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def model_hash(name: str, revision: str | None) -> str:
    """Of what a model's folder holds for those who load it; of a hub model the commit that is cached."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True)).name
        except (LocalEntryNotFoundError, HFValidationError):  # its loading reports what is wrong with it
            return ""
    digest = xxhash.xxh3_128()
    read = [path for path in folder.iterdir() if not any(fnmatch(path.name, unread) for unread in _UNREAD)]
    for path in sorted(path for path in read if path.is_file()):
        digest.update(f"{path.name}\0{file_hash(path)}\0".encode())
    return digest.hexdigest()
