"""Merge a delta into a checkpoint, a shard at a time: the whole model is never in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from adapeft.errors import AdapeftError
from adapeft.inputs.fingerprint import base_name, fingerprint, sample
from adapeft.inputs.model import build_structure
from adapeft.inputs.tokenize import with_padding
from adapeft.ship.delta import Delta

_INDEX = "model.safetensors.index.json"
_COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template*", "preprocessor_config.json",
)  # fmt: skip


def merge(delta: Delta, base: str, out: str | Path) -> Path:
    """Writes base + delta as a plain Hugging Face checkpoint of the task's architecture.

    Args:
        delta: from a run; its description names the task and the labels.
        base: folder or hub name of the delta's base, with safetensors weights.
        out: folder to write, which must not hold anything yet.

    Raises:
        AdapeftError: another base, a base without safetensors, adapters, or ``out`` is not empty.
    """
    out = Path(out)
    adapters = [name for name, change in delta.changes.items() if change.part.kind == "adapter"]
    if adapters:
        raise AdapeftError(
            f"the delta has {len(adapters)} adapters, such as the one behind {adapters[0]!r}: a plain checkpoint has "
            f"no place for them. Load the base in Python and call Delta.apply, which installs them."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapeftError(f"--out {out}: not an empty folder. Give a new one.")
    folder = _local_folder(base)
    checkpoint = _Checkpoint(folder, base, delta)
    checkpoint.check()
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        checkpoint.write(temporary)
        for pattern in _COMPANIONS:
            for companion in folder.glob(pattern):
                if companion.is_file():
                    shutil.copy(companion, temporary)
        out.mkdir(parents=True, exist_ok=True)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


class _Checkpoint:
    """The base's shards under the names of the task's model."""

    def __init__(self, folder: Path, base: str, delta: Delta) -> None:
        described = delta.description.get("model")
        if not isinstance(described, dict):
            raise AdapeftError("the delta does not say which task it was trained for: apply it in Python instead.")
        self.delta = delta
        self.config = AutoConfig.from_pretrained(folder, **described.get("labels", {}))
        if getattr(self.config, "pad_token_id", None) is None:
            self.config.pad_token_id = _pad_token_id(folder)
        structure = build_structure(self.config, described["task"])
        self.config.architectures = [type(structure).__name__]
        self.prefix = structure.base_model_prefix
        self.parameters = [name for name, _ in structure.named_parameters() if name not in delta.new]
        self.buffers = {name for name, _ in structure.named_buffers()}
        self.by_base_name = {base_name(name, self.prefix): name for name in (*self.parameters, *self.buffers)}
        self.shards = _shards(folder, base)

    def tensors(self, shard: Path) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, tensor) of a shard; what the model does not have, such as another head, is left out."""
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name = self.by_base_name.get(base_name(key, self.prefix))
                if name is not None:
                    yield name, file.get_tensor(key)

    def check(self) -> None:
        """Checks that every parameter is there, and the fingerprint, before anything is written."""
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
        self.delta.check_fingerprint(fingerprint(entries.values()))

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Writes the merged shards, the index when there is more than one, and the config."""
        weight_map, total = {}, 0
        for number, shard in enumerate(self.shards):
            merged = {}
            for name, tensor in self.tensors(shard):
                change = self.delta.changes.get(name)
                if change is not None:
                    change.add_to(tensor)
                merged[name] = tensor
            if number == len(self.shards) - 1:
                merged.update({name: value.contiguous() for name, value in self.delta.new.items()})
            save_file(merged, folder / shard.name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(merged, shard.name))
            total += sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
        if len(self.shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / _INDEX).write_text(json.dumps(index, indent=2))
        self.config.save_pretrained(folder)


def _pad_token_id(folder: Path) -> int | None:
    """What the run padded with where the base's config names nothing: classifiers in the manner of GPT-2 need it."""
    try:
        return with_padding(AutoTokenizer.from_pretrained(folder)).pad_token_id
    except (OSError, ValueError):  # a base without a tokenizer
        return None


def _local_folder(base: str) -> Path:
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(base, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except Exception as error:
        raise AdapeftError(f"--model {base!r}: neither a folder nor a model the hub has ({error}).") from error


def _shards(folder: Path, base: str) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        # A file name from an index must not lead out of the checkpoint.
        if any(Path(name).name != name for name in names):
            raise AdapeftError(f"{index}: a shard's name is not a plain file name.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise AdapeftError(f"{index}: names {missing[0]!r}, which is not there. Fetch the base again.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise AdapeftError(f"--model {base!r}: no model.safetensors. Save the base with save_pretrained first.")
