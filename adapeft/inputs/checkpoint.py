"""A checkpoint's tensors under the names of a model, a shard at a time: the whole model is never in memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

from adapeft.errors import AdapeftError
from adapeft.inputs.fingerprint import base_name, fingerprint, sample
from adapeft.reading import Header, reading

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """Safetensors of a base model, read as ``structure`` names them.

    Args:
        base: folder or hub name.
        structure: the model to name them for, which may be on the meta device.
        new: its parameters that no base checkpoint holds.

    Raises:
        AdapeftError: no such base, or none with safetensors.
    """

    def __init__(self, base: str, structure: nn.Module, new: tuple[str, ...] = ()) -> None:
        self.folder = local_folder(base)
        self.prefix = getattr(structure, "base_model_prefix", "")
        self.parameters = [name for name, _ in structure.named_parameters() if name not in new]
        self.buffers = {name for name, _ in structure.named_buffers()}
        self.shards = _shards(self.folder, base)
        self._by_base_name = {base_name(name, self.prefix): name for name in (*self.parameters, *self.buffers)}

    def tensors(self, shard: Path) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, tensor) of a shard; what the model does not have, such as another head, is left out."""
        with _opened(shard) as file:
            for key in file.keys():  # noqa: SIM118
                name = self.name_of(key)
                if name is not None:
                    yield name, file.get_tensor(key)

    def name_of(self, key: str) -> str | None:
        """The model's name for what a file calls ``key``, with the base model's prefix or without; None for others."""
        return self._by_base_name.get(base_name(key, self.prefix))

    def stored(self) -> set[str]:
        """Names in the model of everything that the checkpoint holds."""
        found: set[str | None] = set()
        for shard in self.shards:
            with _opened(shard) as file:
                found |= {self.name_of(key) for key in file.keys()}  # noqa: SIM118
        return {name for name in found if name is not None}

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of ``names`` that the checkpoint holds; no other weight is read."""
        found = {}
        for shard in self.shards:
            with _opened(shard) as file:
                for key in file.keys():  # noqa: SIM118
                    name = self.name_of(key)
                    if name is not None and name in names:
                        found[name] = file.get_tensor(key)
        return found

    def fingerprint(self) -> str:
        """Fingerprint of the base model.

        Raises:
            AdapeftError: a parameter is stored under another name.
        """
        entries = {}
        for shard in self.shards:
            for name, tensor in self.tensors(shard):
                if name not in self.buffers:
                    entries[name] = (base_name(name, self.prefix), sample(tensor), tuple(tensor.shape))
        missing = sorted(set(self.parameters) - set(entries))
        if missing:
            raise AdapeftError(
                f"the base checkpoint stores {missing[0]!r} (and {len(missing) - 1} more) under other names. Load the "
                f"model in Python, apply the delta and call save_pretrained."
            )
        return fingerprint(entries.values())


def local_folder(base: str) -> Path:
    """The folder of a base model, fetched from the hub where it is none.

    Raises:
        AdapeftError: neither a folder nor on the hub.
    """
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(base, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except Exception as error:
        raise AdapeftError(f"--model {base!r}: neither a folder nor a model the hub has ({error}).") from error


class _Index(Header):
    weight_map: dict[str, str]


@contextmanager
def _opened(shard: Path) -> Iterator[safe_open]:
    """Raises ``AdapeftError`` for a file that is no safetensors."""
    with reading(f"{shard} is no safetensors, or it is truncated", "Fetch the base again."):
        file = safe_open(shard, framework="pt")
    with file:
        yield file


def _shards(folder: Path, base: str) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        with reading(f"{index}: damaged", "Fetch the base again."):
            names = sorted(set(_Index.model_validate(json.loads(index.read_bytes())).weight_map.values()))
            # A file name from an index must not lead out of the checkpoint.
            if any(Path(name).name != name for name in names):
                raise AdapeftError(f"{index}: a shard's name is not a plain file name.")
            missing = [name for name in names if not (folder / name).is_file()]  # an OSError for a name too long
        if missing:
            raise AdapeftError(f"{index}: names {missing[0]!r}, which is not there. Fetch the base again.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise AdapeftError(f"--model {base!r}: no model.safetensors. Save the base with save_pretrained first.")
