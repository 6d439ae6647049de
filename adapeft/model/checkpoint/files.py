"""Lookup of the weight files that transformers reads from a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from adapeft.errors import AdapeftError
from adapeft.files.damage import Header, reading

_ORDER = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""In transformers' order of preference, which decides between several, such as an old index next to a new file."""
_COMPANIONS = ["*.json", "*.txt", "*.model"]


def local_folder(base: str, revision: str | None = None) -> Path:
    """Return the folder of a base model, downloaded from the hub, at ``revision``, if ``base`` is not a folder.

    Raises:
        AdapeftError: the base is neither a folder nor on the hub, or a revision of a folder is asked for.
    """
    if Path(base).is_dir():
        if revision is not None:
            raise AdapeftError(f"--revision {revision}: --model {base!r} is a folder, which has none. Leave it out.")
        return Path(base)
    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=["*.safetensors", *_COMPANIONS]))
        if not has_weights(folder):
            pickled = ["pytorch_model*.bin", *_COMPANIONS]
            folder = Path(snapshot_download(base, revision=revision, allow_patterns=pickled))
        return folder
    except Exception as error:
        raise AdapeftError(f"--model {base!r} is neither a folder nor a model on the hub ({error}).") from error


def has_weights(folder: Path) -> bool:
    """Whether transformers finds a weight file or an index of weight files in ``folder``."""
    return any((folder / name).is_file() for name in _ORDER)


def weight_files(folder: Path, base: str, explicit: str | None = None) -> list[Path]:
    """Return the weight files that transformers would load, safetensors or pickled.

    Args:
        folder: folder of the base model.
        base: name that the user gave for it, for messages.
        explicit: file or index named by the config's ``transformers_weights``.

    Raises:
        AdapeftError: there are no weights that transformers would find, or shards are missing.
    """
    name = explicit or next((name for name in _ORDER if (folder / name).is_file()), None)
    if name is None:
        raise AdapeftError(f"--model {base!r}: {_why_none(folder)} Save the base with save_pretrained first.")
    _check_plain(name, folder / "config.json")
    if name.endswith(".index.json"):
        return _shards(folder / name)
    if not (folder / name).is_file():
        raise AdapeftError(f"--model {base!r}: config.json names {name!r}, which is missing. Download the base again.")
    return [folder / name]


class _Index(Header):
    weight_map: dict[str, str]


def _shards(index: Path) -> list[Path]:
    with reading(f"{index} is damaged", "Download the base again."):
        names = sorted(set(_Index.model_validate(json.loads(index.read_bytes())).weight_map.values()))
        for name in names:
            _check_plain(name, index)
        missing = [name for name in names if not (index.parent / name).is_file()]  # an OSError for a name too long
    if missing:
        raise AdapeftError(f"{index} names {missing[0]!r}, which is missing. Download the base again.")
    return [index.parent / name for name in names]


def _check_plain(name: str, source: Path) -> None:
    """Raise ``AdapeftError`` for a file name that points outside the checkpoint."""
    if Path(name).name != name:
        raise AdapeftError(f"{source}: the name of a shard is not a plain file name.")


def _why_none(folder: Path) -> str:
    """Return the reason why transformers would find no weights in ``folder``."""
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    if any(name.startswith("adapter_model") for name in others):
        return "the folder has a PEFT adapter, not a base model: give the adapter's base."
    if others:
        return (
            f"the folder has no model.safetensors or pytorch_model.bin, only {others[0]!r}, which transformers reads "
            f"only on request (variant=…)."
        )
    return "the folder has no model.safetensors or pytorch_model.bin."
