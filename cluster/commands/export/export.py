"""``adapeft export``: a delta or a subset in the formats of other tools."""

from __future__ import annotations

import json
from pathlib import Path

from adapeft.deltas.delta import Delta
from adapeft.errors import AdapeftError, did_you_mean
from adapeft.files.artifact import artifact_kind
from adapeft.formats.peft.folder import save_for_peft
from adapeft.formats.unfrozen import save_unfrozen_parameters
from adapeft.servers import rank_to_serve
from adapeft.subset.subset import Subset
from cluster.terminal.console import Terminal

_FORMATS = ("peft", "unfrozen-parameters")


def export(
    path: Path,
    to: str,
    model: str | None,
    out: Path,
    terminal: Terminal,
    *,
    servable: bool = False,
    revision: str | None = None,
) -> None:
    """Export the delta or subset at ``path`` and print the paths of the written files.

    Raises:
        AdapeftError: the format is unknown or cannot hold it, or ``model`` is missing or not used by the format.
    """
    if to not in _FORMATS:
        pointer = " `adapeft merge` writes a plain checkpoint." if to == "checkpoint" else did_you_mean(to, _FORMATS)
        raise AdapeftError(f"--to {to}: unknown format. The formats are {' and '.join(_FORMATS)}.{pointer}")
    if to == "unfrozen-parameters":
        for option, is_given in (
            ("model", model is not None),
            ("revision", revision is not None),
            ("servable", servable),
        ):
            if is_given:
                raise AdapeftError(
                    f"--{option}: not used by unfrozen-parameters, which only lists names. Leave it out."
                )
        print(save_unfrozen_parameters(_load(path), out))
        return
    if model is None:
        raise AdapeftError("--model: missing. A PEFT adapter is checked against its base; give its folder or hub name.")
    found = _load(path)
    if isinstance(found, Subset):
        raise AdapeftError(f"{path}: a subset, but a PEFT adapter holds trained values. Give the delta of a run.")
    with terminal.noting():
        folders = save_for_peft(found, model, out, servable=servable, revision=revision)
    beyond = [what for folder in folders for what in _beyond_lora(folder)]
    if beyond:
        terminal.note(
            f"the adapter has {', '.join(beyond)}. PEFT loads them, but loaders of plain LoRA, such as vLLM's, refuse "
            f"or ignore them. `adapeft merge` writes a checkpoint that holds everything."
        )
    if servable:
        rank = json.loads((folders[0] / "adapter_config.json").read_text())["r"]
        terminal.note(f"the adapter has rank {rank}: serve it with max-lora-rank {rank_to_serve(rank)} in vLLM.")
    for folder in folders:
        print(folder)
    if len(folders) > 1:
        terminal.note(
            "The two adapters belong together: PeftMixedModel.from_pretrained(model, '…/shira', 'shira'), then "
            "load_adapter('…/lora', 'lora') and set_adapter(['shira', 'lora'])."
        )


def _beyond_lora(folder: Path) -> list[str]:
    """Return the parts of an adapter that are not LoRA on matrices."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {
        "modules saved whole": config.get("modules_to_save"),
        "rows of embeddings": config.get("trainable_token_indices"),
        "biases": config.get("lora_bias"),
        "single elements": config["peft_type"] == "SHIRA",
    }
    return [what for what, there in found.items() if there]


def _load(path: Path) -> Subset | Delta:
    kind = artifact_kind(path)
    if kind not in ("subset", "delta"):
        raise AdapeftError(f"{path}: neither a delta nor a subset. Give a file written by a run.")
    return Subset.load(path) if kind == "subset" else Delta.load(path)
