"""Export of a delta as a folder that PEFT loads, or as two folders if it needs adapters of two types."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import torch
from peft import LoraConfig, ShiraConfig, TaskType
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor

from adapeft.deltas.base import Base, base_of
from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError
from adapeft.files.artifact import check_new_folder, new_folder
from adapeft.finite import check_finite
from adapeft.formats.peft.lora import lora_for_peft, target_modules
from adapeft.formats.peft.parts import PREFIX, REMEDY, PeftParts, shira_rank, sort_for_peft
from adapeft.formats.peft.servable import check_targets, make_servable
from adapeft.model.rounding import Rounding
from adapeft.tasks.registry import TASKS

# A second adapter is matched against names with PEFT's prefix.
_OPTIONAL_PREFIX = f"({PREFIX})?".replace(".", r"\.")


def save_for_peft(
    delta: Delta, base: str, out: str | Path, *, servable: bool = False, revision: str | None = None
) -> list[Path]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``peft.PeftModel.from_pretrained``.

    LoRA stays LoRA, and k rows of a linear layer are exactly LoRA of rank k: a loader that uses only r, lora_alpha and
    the tensors reads both correctly (see ``lora_for_peft``). Single elements become SHiRA, those of a ``Conv1D`` the
    LoRA of the rows or columns that they are in, rows of embeddings trainable tokens, and the bias of a linear layer a
    bias of LoRA. Every other tensor, and a matrix too dense for SHiRA, goes with its module into ``modules_to_save``:
    base + difference, in the base's dtype. Only PEFT loads what is not LoRA. With both SHiRA and LoRA there are two
    folders, ``out/shira`` and ``out/lora``, which ``peft.PeftMixedModel`` loads in this order.

    Args:
        delta: delta of a run; its description names the task.
        base: folder or hub name of the base of the delta, with safetensors weights.
        out: folder to write, which must not exist or be empty.
        servable: whether the LoRA loaders of vLLM and SGLang must accept the adapter (see ``adapeft/servers.py``).
        revision: branch, tag or commit of a base on the hub, which the adapter names.

    Returns:
        The folders that hold an adapter.

    Raises:
        AdapeftError: the base is another one, PEFT, or with ``servable`` vLLM or SGLang, cannot hold a change,
            or ``out`` is not empty.
    """
    out = Path(out)
    check_new_folder(out)
    found = base_of(delta, base, revision)
    parts = sort_for_peft(delta, found.structure)
    if servable:
        make_servable(parts, found.structure)
    delta.check_fingerprint(found.checkpoint.fingerprint(delta.new), found.checkpoint.entries(delta.new))
    both = bool(parts.elements and parts.needs_lora)
    adapters: dict[str, tuple[LoraConfig | ShiraConfig, dict[str, Tensor]]] = {}
    if parts.elements:
        adapters["shira"] = _shira(parts, found, before=_OPTIONAL_PREFIX if both else "")
    if parts.needs_lora or not parts.elements:
        adapters["lora"] = _lora(parts, delta, found, before=_OPTIONAL_PREFIX if both else "", servable=servable)
    first, tensors_of_first = adapters["shira" if parts.elements else "lora"]
    first.modules_to_save = sorted(parts.modules) or None
    tensors_of_first.update(_modules(parts.modules, delta, found))
    with new_folder(out) as temporary:
        for name, (config, tensors) in adapters.items():
            config.base_model_name_or_path = delta.description["model"].get("name")
            config.revision = revision
            config.task_type = None if both else _task_type(parts, delta, found)
            config.inference_mode = True
            folder = temporary / name if both else temporary
            folder.mkdir(exist_ok=True)
            renamed = {PREFIX + key: value.contiguous() for key, value in tensors.items()}
            check_finite(renamed, "the adapter for PEFT", "The delta's values are too large: scale it by less.")
            save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(str(folder))
    return [out / name for name in adapters] if both else [out]


def _lora(
    parts: PeftParts, delta: Delta, base: Base, before: str, servable: bool
) -> tuple[LoraConfig, dict[str, Tensor]]:
    if parts.lora:
        config, factors = lora_for_peft(parts.lora, base.structure, before, one_rank=servable)
        if servable:
            check_targets(config)
    else:
        config, factors = LoraConfig(r=1, lora_alpha=1, target_modules=DUMMY_TARGET_MODULES), {}
    config.lora_bias = bool(parts.biases)
    tensors: dict[str, Tensor] = {}
    for layer, (a, b) in factors.items():
        tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        if config.lora_bias:
            bias = torch.zeros(len(b))
            if layer in parts.biases:
                parts.biases[layer].add_to(f"{layer}.bias", bias)
            tensors[f"{layer}.lora_B.bias"] = bias
    if parts.tokens:
        rows = {path: change.part.indices for path, change in parts.tokens.items()}
        config.trainable_token_indices = {path: indices.tolist() for path, indices in rows.items()}
        trained = _trained([f"{path}.weight" for path in rows], delta, base)
        for path, indices in rows.items():
            tensors[f"{path}.token_adapter.trainable_tokens_delta"] = trained[f"{path}.weight"][indices]
    return config, tensors


def _shira(parts: PeftParts, base: Base, before: str) -> tuple[ShiraConfig, dict[str, Tensor]]:
    """Return a SHiRA adapter. It has r (in + out) elements in every matrix with one r for all, padded with zeros."""
    r = max(shira_rank(change) for change in parts.elements.values())
    tensors = {}
    for name, change in parts.elements.items():
        shape, indices = change.part.shape, change.part.indices
        free = torch.ones(math.prod(shape), dtype=torch.bool)
        free[indices] = False
        fill = free.nonzero().squeeze(1)[: r * sum(shape) - len(indices)]
        positions, layer = torch.cat([indices, fill]), name.removesuffix(".weight")
        tensors[f"{layer}.shira_weight"] = torch.cat([change.values, torch.zeros(len(fill))])
        tensors[f"{layer}.shira_indices"] = torch.stack([positions // shape[1], positions % shape[1]]).int()
    config = ShiraConfig(
        r=r,
        # Any name but PEFT's own "random": the positions come from the file.
        mask_type="adapeft",  # type: ignore[arg-type]
        target_modules=target_modules(
            [name.removesuffix(".weight") for name in parts.elements], base.structure, before
        ),
        inference_mode=True,
    )
    return config, tensors


def _modules(paths: Collection[str], delta: Delta, base: Base) -> dict[str, Tensor]:
    """Return all trained parameters and buffers of the modules at ``paths``."""
    keys = [f"{path}.{key}" for path in paths for key in base.structure.get_submodule(path).state_dict()]
    # A tied parameter is stored under the first of its names.
    by_id = {id(parameter): name for name, parameter in base.structure.named_parameters()}
    every = dict(base.structure.named_parameters(remove_duplicate=False))
    stored = {key: by_id[id(every[key])] if key in every else key for key in keys}
    trained = _trained(stored.values(), delta, base)
    missing = sorted(set(stored.values()) - set(trained))
    if missing:
        raise AdapeftError(f"neither the delta nor the base has {missing[0]!r}, which PEFT would save. {REMEDY}")
    return {key: trained[name].clone() for key, name in stored.items()}


def _trained(names: Collection[str], delta: Delta, base: Base) -> dict[str, Tensor]:
    """Return the values of parameters and buffers with the delta added, in the base's dtype."""
    found = base.checkpoint.read(set(names))
    rounding = sum(
        (delta.changes[name].add_to(name, found[name]) for name in found if name in delta.changes), Rounding()
    )
    rounding.warn('Merge the delta in float32 instead: adapeft.merge(…, dtype="float32"), or merge --dtype float32.')
    whole = {**delta.new, **delta.buffers}
    return {**found, **{name: whole[name] for name in names if name in whole}}


def _task_type(parts: PeftParts, delta: Delta, base: Base) -> TaskType | None:
    """Return PEFT's task type; None for a classifier whose head is not saved, because PEFT would look for it."""
    task = TASKS[delta.description["model"]["task"]]
    if task.export_type is None:
        return None
    if not task.has_head:
        return TaskType(task.export_type)
    heads = {path for path, _ in base.structure.named_modules() if path.endswith(("classifier", "score"))}
    return TaskType(task.export_type) if heads <= parts.modules else None
