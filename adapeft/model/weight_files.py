"""The files of a folder that transformers reads a model's weights from."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from adapeft.errors import AdapeftError
from adapeft.files.damage import Header, reading

_ORDER = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""As transformers looks for them: what is there twice, such as an old index next to a new file, is decided here."""
_COMPANIONS = ["*.json", "*.txt", "*.model"]


def local_folder(base: str) -> Path:
    """The folder of a base model, fetched from the hub where it is none.

    Raises:
        AdapeftError: neither a folder nor on the hub.
    """
    if Path(base).is_dir():
        return Path(base)
    try:
        folder = Path(snapshot_download(base, allow_patterns=["*.safetensors", *_COMPANIONS]))
        if not has_weights(folder):
            folder = Path(snapshot_download(base, allow_patterns=["pytorch_model*.bin", *_COMPANIONS]))
        return folder
    except Exception as error:
        raise AdapeftError(f"--model {base!r}: neither a folder nor a model the hub has ({error}).") from error


def has_weights(folder: Path) -> bool:
    """Whether transformers finds a file of weights, or an index of some, in ``folder``."""
    return any((folder / name).is_file() for name in _ORDER)


def weight_files(folder: Path, base: str, explicit: str | None = None) -> list[Path]:
    """The files of weights, safetensors or pickled, in transformers' order of preference.

    Args:
        folder: of the base model.
        base: what the user calls it, for messages.
        explicit: the config's ``transformers_weights``, which names a file or an index.

    Raises:
        AdapeftError: no weights that transformers would find, or shards that are missing.
    """
    name = explicit or next((name for name in _ORDER if (folder / name).is_file()), None)
    if name is None:
        raise AdapeftError(f"--model {base!r}: {_why_none(folder)} Save the base with save_pretrained first.")
    _check_plain(name, folder / "config.json")
    if name.endswith(".index.json"):
        return _shards(folder / name)
    if not (folder / name).is_file():
        raise AdapeftError(f"--model {base!r}: config.json names {name!r}, which is not there. Fetch the base again.")
    return [folder / name]


class _Index(Header):
    weight_map: dict[str, str]


def _shards(index: Path) -> list[Path]:
    with reading(f"{index}: damaged", "Fetch the base again."):
        names = sorted(set(_Index.model_validate(json.loads(index.read_bytes())).weight_map.values()))
        for name in names:
            _check_plain(name, index)
        missing = [name for name in names if not (index.parent / name).is_file()]  # an OSError for a name too long
    if missing:
        raise AdapeftError(f"{index}: names {missing[0]!r}, which is not there. Fetch the base again.")
    return [index.parent / name for name in names]


def _check_plain(name: str, source: Path) -> None:
    """Raises ``AdapeftError`` for a file name that leads out of the checkpoint."""
    if Path(name).name != name:
        raise AdapeftError(f"{source}: a shard's name is not a plain file name.")


def _why_none(folder: Path) -> str:
    """What is there instead of weights that transformers would find."""
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    if any(name.startswith("adapter_model") for name in others):
        return "it holds a PEFT adapter, no base model: give the adapter's base."
    if others:
        return (
            f"no model.safetensors and no pytorch_model.bin, only {others[0]!r}, which transformers reads when it is "
            f"named alone (variant=…)."
        )
    return "no model.safetensors and no pytorch_model.bin."
