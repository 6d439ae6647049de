"""Merge a delta into a checkpoint, a shard at a time: the whole model is never in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from adapeft.artifact import check_new_folder, new_folder
from adapeft.errors import AdapeftError
from adapeft.inputs.checkpoint import INDEX
from adapeft.inputs.tokenize import with_padding
from adapeft.ship.base import base_of
from adapeft.ship.delta import Delta

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
    check_new_folder(out)
    merging = _Merging(delta, base)
    delta.check_fingerprint(merging.checkpoint.fingerprint())
    with new_folder(out) as temporary:
        merging.write(temporary)
        for pattern in _COMPANIONS:
            for companion in merging.checkpoint.folder.glob(pattern):
                if companion.is_file():
                    shutil.copy(companion, temporary)
    return out


class _Merging:
    """A delta and the base's shards under the names of the task's model."""

    def __init__(self, delta: Delta, base: str) -> None:
        found = base_of(delta, base)
        self.delta, self.config, self.checkpoint = delta, found.config, found.checkpoint
        if getattr(self.config, "pad_token_id", None) is None:
            self.config.pad_token_id = _pad_token_id(self.checkpoint.folder)
        self.config.architectures = [type(found.structure).__name__]

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Writes the merged shards, the index when there is more than one, and the config."""
        weight_map, total, whole = {}, 0, {**self.delta.new, **self.delta.buffers}
        shards = self.checkpoint.shards
        for number, shard in enumerate(shards):
            merged = {}
            for name, tensor in self.checkpoint.tensors(shard):
                change = self.delta.changes.get(name)
                if change is not None:
                    change.add_to(tensor)
                merged[name] = whole.pop(name, tensor)
            if number == len(shards) - 1:
                merged.update({name: value.contiguous() for name, value in whole.items()})
            save_file(merged, folder / shard.name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(merged, shard.name))
            total += sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2))
        self.config.save_pretrained(folder)


def _pad_token_id(folder: Path) -> int | None:
    """What the run padded with where the base's config names nothing: classifiers in the manner of GPT-2 need it."""
    try:
        return with_padding(AutoTokenizer.from_pretrained(folder)).pad_token_id
    except (OSError, ValueError):  # a base without a tokenizer
        return None
