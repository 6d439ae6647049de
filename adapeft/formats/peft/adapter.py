"""Reading of a LoRA adapter of PEFT from its folder; features without a counterpart in a delta are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from adapeft.errors import AdapeftError
from adapeft.files.damage import reading
from adapeft.finite import check_finite
from adapeft.formats.peft.parts import PREFIX

MERGE_IN_PEFT = "Load it with PEFT, call merge_and_unload, and use the merged model."

# Keys without effect after training: the tensors determine which layers the adapter has.
_PAST = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_version", "revision", "target_modules", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "init_lora_weights", "lora_alpha", "lora_bias", "peft_type", "r", "rank_pattern",
    "trainable_token_indices", "use_rslora",
}  # fmt: skip
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that do not change the weights of the base."""

_PIECE = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.default)?(?:\.(weight|bias))?")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_LONGEST_PATTERN = 500
_WRAPPING = re.compile(r"\.(?:modules_to_save\.default|modules_to_save|base_layer)(?=\.)")


@dataclass(frozen=True)
class LowRank:
    """LoRA of a layer, which adds scaling · (B A x + bias).

    Attributes:
        a: [rank, in].
        b: [out, rank].
        bias: [out], or None.
        alpha: scaling · rank.
        is_embedding: whether the layer is an embedding, with its number of rows as ``in``.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    alpha: float
    is_embedding: bool


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter with the names of the model that it was trained on.

    Attributes:
        layers: path → LoRA.
        tokens: path of an embedding → indices of rows, their values.
        whole: parameter of a module saved whole → its value.
        task_type: PEFT's name of the task, or None.
        revision: branch, tag or commit of the base on the hub that it was trained on, or None.
    """

    layers: Mapping[str, LowRank]
    tokens: Mapping[str, tuple[Tensor, Tensor]]
    whole: Mapping[str, Tensor]
    task_type: str | None
    revision: str | None


def read_adapter(folder: str | Path) -> PeftAdapter:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapeftError: a file is missing or truncated, the adapter is not LoRA, or it has a feature without a counterpart
            in a delta.
    """
    folder = Path(folder)
    config, tensors = _read_config(folder), _read_tensors(folder)
    pieces: dict[str, dict[str, Tensor]] = {}
    tokens, whole = {}, {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if found := _PIECE.fullmatch(name):
            path, piece, kind = found.groups()
            pieces.setdefault(path, {})["bias" if kind == "bias" else piece] = value
        elif found := _TOKENS.fullmatch(name):
            tokens[found.group(1)] = value
        elif "lora_" in name or "trainable_tokens" in name:
            raise AdapeftError(f"{folder}: {key!r} belongs to a LoRA variant without counterpart. {MERGE_IN_PEFT}")
        else:
            whole[_WRAPPING.sub("", name)] = value
    if sum(map(len, pieces.values())) + len(tokens) + len(whole) < len(tensors):
        raise AdapeftError(f"{folder}: adapter_model.safetensors has a tensor under two names. {MERGE_IN_PEFT}")
    layers = {path: _low_rank(folder, path, found, config) for path, found in pieces.items()}
    return PeftAdapter(
        layers,
        {path: (_token_indices(folder, path, values, config), values) for path, values in tokens.items()},
        whole,
        config.get("task_type"),
        config.get("revision"),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    with reading(f"{path}: cannot be read", "Give the folder of a PEFT adapter."):
        config = json.loads(path.read_bytes())
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapeftError(f"{path}: peft_type = {found!r}: only LoRA can be imported. {MERGE_IN_PEFT}")
    defaults = {f.name: f.default if f.default is not MISSING else None for f in fields(LoraConfig)}
    for key, value in config.items():
        if key not in _PAST | _READ and value and value != defaults.get(key):
            raise AdapeftError(f"{path}: {key} = {value!r}: has no counterpart in a delta. {MERGE_IN_PEFT}")
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise AdapeftError(f"{path}: init_lora_weights = {start!r} changes the weights of the base. {MERGE_IN_PEFT}")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapeftError(
            f"{folder}: adapter_model.bin is a pickle, which may run code when it is read. If you trust it, load it "
            f"with PEFT and call save_pretrained, which writes adapter_model.safetensors."
        )
    with reading(f"{path}: missing, truncated or not safetensors", "Give the folder of a PEFT adapter."):
        tensors = load_file(path)
        check_finite(tensors, str(path), "Its training diverged: use another adapter.")
        return tensors


def _low_rank(folder: Path, path: str, pieces: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    is_embedding = "lora_embedding_A" in pieces
    a, b = (pieces.get(f"lora_embedding_{piece}" if is_embedding else f"lora_{piece}") for piece in "AB")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
        raise AdapeftError(
            f"{folder}: {path!r} has no lora_A [rank, in] and lora_B [out, rank] of the same rank. {MERGE_IN_PEFT}"
        )
    rank, alpha = (
        _of_layer(folder, path, config, *keys) for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if rank != len(a):
        raise AdapeftError(f"{folder}: {path!r} has a LoRA of rank {len(a)}, but {rank!r} in adapter_config.json.")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise AdapeftError(f"{folder}: {path!r} has alpha {alpha!r}, but alpha has to be a number above 0.")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    used = a.any(1) | b.any(0)  # drops the zeros with which files are padded to the rank of other layers
    used[0] = True
    a, b = a[used].float(), b[:, used].float()
    return LowRank(a, b, pieces.get("bias"), scaling * len(a), is_embedding)


def _of_layer(folder: Path, path: str, config: Mapping[str, Any], pattern: str, key: str) -> Any:
    """Return the value of the pattern that matches the layer, else that of all layers."""
    own = config.get(pattern) or {}
    setting = f"{pattern} = {str(own)[:_LONGEST_PATTERN]}"
    with reading(f"{folder}/adapter_config.json: {setting}: invalid patterns of layers", MERGE_IN_PEFT, re.error):
        for spelled in own:
            _check_ends(spelled)
        return own.get(get_pattern_key(list(own), path), config.get(key))


def _check_ends(pattern: str) -> None:
    """Raise ``ValueError`` for a pattern that could take forever to match, such as one with nested repetitions."""
    bare = re.sub(r"\\.", "", pattern)
    if len(pattern) > _LONGEST_PATTERN or re.search(r"\)[*+{]", bare) or len(re.findall("[*+{]", bare)) > 3:
        raise ValueError(f"{pattern[:_LONGEST_PATTERN]!r} is too long or has too many repetitions")
    if bare.count("?") > 3:
        raise ValueError(f"{pattern!r} has too many optional parts")


def _token_indices(folder: Path, path: str, values: Tensor, config: Mapping[str, Any]) -> Tensor:
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        given = next((indices for end, indices in given.items() if path.endswith(end)), None)
    indices = given if isinstance(given, list) else []
    known = all(isinstance(index, int) and 0 <= index < 2**31 for index in indices)
    if not indices or not known or len(indices) != len(values):
        raise AdapeftError(
            f"{folder}: trainable_token_indices does not list the indices of the {len(values)} rows of {path!r}."
        )
    return torch.tensor(indices, dtype=torch.long)
