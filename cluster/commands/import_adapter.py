"""``adapeft import``: convert a PEFT adapter to a delta."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapeft.errors import AdapeftError
from adapeft.tasks.registry import TASKS
from cluster.terminal.silence import silence_libraries


def import_adapter(
    folder: Annotated[Path, typer.Argument(help="folder of a PEFT LoRA adapter")],
    model: Annotated[str, typer.Option(help="base model of the adapter: folder or hub name")],
    out: Annotated[Path, typer.Option(help="delta.safetensors to write")],
    task: Annotated[str | None, typer.Option(help=f"task: {' or '.join(TASKS)}; default: the adapter's")] = None,
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of a base on the hub; default: the adapter's")
    ] = None,
) -> None:
    """Convert a PEFT LoRA adapter to a delta."""
    from adapeft.formats.peft.reader import load_from_peft

    if out.exists():
        raise AdapeftError(f"--out {out}: the file exists already. Give a new file.")
    silence_libraries()
    load_from_peft(folder, model, task, revision=revision).save(out)
    print(out)
