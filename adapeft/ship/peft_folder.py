"""LoRA parts of a delta as a folder that PEFT loads."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from adapeft.errors import AdapeftError
from adapeft.ship.delta import Delta
from adapeft.tune.lora import lora_config

_PREFIX = "base_model.model."


def save_for_peft(delta: Delta, out: str | Path) -> Path:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` for ``peft.PeftModel.from_pretrained``.

    A new head goes along as one of PEFT's ``modules_to_save``.

    Args:
        delta: of LoRA parts and new parameters alone.
        out: folder to write, which must not hold anything yet.

    Raises:
        AdapeftError: the delta has other parts, or ``out`` is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapeftError(f"{out}: not an empty folder. Give a new one.")
    others = [name for name, change in delta.changes.items() if change.part.kind != "lora"]
    if others or not delta.changes:
        found = f"{others[0]!r} is changed as {delta.changes[others[0]].part.kind}" if others else "it has none"
        raise AdapeftError(f"a PEFT folder holds LoRA alone, and of this delta {found}. Merge it, or call Delta.apply.")
    config = lora_config({name: change.part for name, change in delta.changes.items()})
    config.modules_to_save = sorted({name.rpartition(".")[0] for name in delta.new}) or None
    config.base_model_name_or_path = dict(delta.description.get("model", {})).get("name")
    config.inference_mode = True
    tensors = {f"{_PREFIX}{name}": value.contiguous() for name, value in delta.new.items()}
    for name, change in delta.changes.items():
        for piece, value in change.part.split(change.values).items():
            tensors[f"{_PREFIX}{name.removesuffix('.weight')}.{piece}.weight"] = value.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(out))
    return out
