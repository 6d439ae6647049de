"""Merging of a delta into a checkpoint, shard by shard; only formats that need transformers are loaded as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from adapeft.deltas.base import base_of
from adapeft.deltas.delta import Delta
from adapeft.deltas.unquantized import check_may_be_merged, for_unquantized
from adapeft.errors import AdapeftError
from adapeft.files.artifact import check_new_folder, new_folder, save_json
from adapeft.files.damage import load_json
from adapeft.finite import check_finite
from adapeft.model.checkpoint.checkpoint import Checkpoint, StoredCheckpoint
from adapeft.model.dense import check_dense
from adapeft.model.rounding import Rounding

REPORT = "adapeft_merge.json"
"""File next to the weights with the merged delta, the number of entries lost to rounding, and scores if compared."""
_DTYPES = ("float32", "bfloat16", "float16")
_COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template*", "preprocessor_config.json",
)  # fmt: skip


def merge(
    delta: Delta,
    base: str,
    out: str | Path,
    dtype: str | None = None,
    *,
    unquantized: bool = False,
    revision: str | None = None,
) -> Path:
    """Write base + delta as a plain Hugging Face checkpoint of the task's architecture.

    Entries of the delta that are lost to rounding are counted in ``adapeft_merge.json`` and cause a warning.

    Args:
        delta: delta of a run; its description names the task and the labels.
        base: folder or hub name of the base of the delta.
        out: folder to write, which must not exist or be empty.
        dtype: ``float32``, ``bfloat16`` or ``float16``, the dtype of the written weights; None for that of the
            checkpoint. In float32 no entry is lost to rounding.
        unquantized: whether the delta was trained on a quantized base and ``base`` is its unquantized checkpoint. The
            result is another model than the one that was trained.
        revision: branch, tag or commit of a base on the hub.

    Raises:
        AdapeftError: the base is another one or has no weights, the delta has adapters, or belongs to a quantized base
            without ``unquantized``, weights are not finite before or after merging, or ``out`` is not empty.
    """
    out = Path(out)
    if dtype is not None and dtype not in _DTYPES:
        raise AdapeftError(f"--dtype {dtype}: give one of {', '.join(_DTYPES)}, or leave it out for the base's own.")
    adapters = [name for name, change in delta.changes.items() if not change.part.changes_parameter]
    if adapters:
        raise AdapeftError(
            f"the delta has {len(adapters)} adapters, such as the one behind {adapters[0]!r}: a plain checkpoint "
            f"cannot hold them. Load the base in Python and call Delta.apply, which installs them."
        )
    check_may_be_merged(delta, unquantized=unquantized)
    check_new_folder(out)
    found = base_of(delta, base, revision)
    if unquantized:
        delta = for_unquantized(delta, found)
    delta.check_shapes(found.structure)
    if not unquantized:
        delta.check_fingerprint(found.checkpoint.fingerprint(delta.new), found.checkpoint.entries(delta.new))
    delta.check_finite("the delta", "Its training diverged: train again at a lower learning rate.")
    merging = _Merging(delta, found.checkpoint, None if dtype is None else getattr(torch, dtype))
    with new_folder(out) as temporary:
        rounding = merging.write(temporary)
        save_json(temporary / REPORT, _report(delta, base, revision, rounding))
        for pattern in _COMPANIONS:
            for companion in found.checkpoint.folder.glob(pattern):
                if companion.is_file():
                    shutil.copy(companion, temporary)
        if found.tokenizer is not None:
            found.tokenizer.save_pretrained(temporary)
    rounding.warn('Merge in float32 to keep them: dtype="float32", or adapeft merge --dtype float32.')
    return out


def add_scores(merged: Path, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Add scores by model, such as that of the delta on its base, to the report of a checkpoint that was merged."""
    report = load_json(merged / REPORT, "a report of a merged checkpoint", "Merge again.")
    save_json(merged / REPORT, {**report, "scores": scores})


class _Merging:
    """A delta and the base's weights under the names of the task's model."""

    def __init__(self, delta: Delta, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
        self.delta, self.checkpoint, self.dtype = delta, checkpoint, dtype
        self.config = checkpoint.structure.config
        self.config.architectures = [type(checkpoint.structure).__name__]
        if dtype is not None:
            self.config.dtype = dtype
        if hasattr(self.config, "transformers_weights"):
            del self.config.transformers_weights  # the merged files have their usual names
        checkpoint.settle_ties()

    @torch.no_grad()
    def write(self, folder: Path) -> Rounding:
        """Write the merged weights and the config, and return the entries lost to rounding."""
        if isinstance(self.checkpoint, StoredCheckpoint):
            return self._write_shards(self.checkpoint, folder)
        return self._write_model(folder)

    def _write_shards(self, checkpoint: StoredCheckpoint, folder: Path) -> Rounding:
        """Write shard by shard, with an index if there is more than one."""
        weight_map, total, rounding = {}, 0, Rounding()
        whole = {**self.delta.new, **self.delta.buffers}
        for shard in checkpoint.shards:
            merged = {}
            for name, tensor in checkpoint.in_shard(shard):
                merged[name], lost = self._merged(name, whole.pop(name, tensor))
                rounding += lost
            if shard == checkpoint.shards[-1]:
                merged.update({name: self._merged(name, value)[0].contiguous() for name, value in whole.items()})
            name = shard.name if len(checkpoint.shards) > 1 else SAFE_WEIGHTS_NAME
            save_file(merged, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(merged, name))
            total += sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
        if len(checkpoint.shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))
        self.config.save_pretrained(folder)
        return rounding

    def _write_model(self, folder: Path) -> Rounding:
        """Write a model loaded by transformers, with its ``save_pretrained``."""
        model, rounding = self.checkpoint.structure, Rounding()
        whole = {**self.delta.new, **self.delta.buffers}
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            tensor.data, lost = self._merged(name, whole.get(name, tensor.data))
            rounding += lost
        model.save_pretrained(folder)
        return rounding

    def _merged(self, name: str, tensor: Tensor) -> tuple[Tensor, Rounding]:
        """Return a tensor of the base with its change in the dtype to write, and the entries lost to rounding."""
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        change = self.delta.changes.get(name)
        if change is not None:
            check_dense("merge", [(name, tensor)])
        check_finite({name: tensor}, "the base model", "Its checkpoint is damaged: get a new copy.")
        if change is not None and dtype == tensor.dtype:
            return tensor, change.add_to(name, tensor)
        before = tensor.to(dtype)
        if change is not None:
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            change.add_to(name, tensor)
        after = tensor.to(dtype)
        check_finite({name: after}, f"merging in {dtype}", "Its values are too large for this dtype: use float32.")
        return after, Rounding() if change is None else change.rounding(before, after)


def _report(delta: Delta, base: str, revision: str | None, rounding: Rounding) -> dict[str, Any]:
    return {
        "base": base,
        **({"revision": revision} if revision else {}),
        "fingerprint": delta.fingerprint,
        "method": delta.description.get("method"),
        **({"trained_on": delta.quantization} if delta.quantization else {}),
        "rounding": {"entries": rounding.entries, "lost": rounding.lost},
    }
