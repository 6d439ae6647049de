"""The command line of ``adapeft export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.terminal.silence import silence_libraries


def export(
    path: Annotated[Path, typer.Argument(help="delta.safetensors of a run; for unfrozen-parameters also a subset")],
    to: Annotated[str, typer.Option(help="peft: a PEFT adapter; unfrozen-parameters: a list of names for axolotl")],
    out: Annotated[Path, typer.Option(help="folder to write, new or empty; for unfrozen-parameters a file")],
    model: Annotated[str | None, typer.Option(help="base model: folder or hub name; only for peft")] = None,
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit of a base on the hub; only for peft")
    ] = None,
    servable: Annotated[
        bool,
        typer.Option("--servable", help="refuse what the LoRA loaders of vLLM and SGLang cannot load; only for peft"),
    ] = False,
) -> None:
    """Write a delta in the format of another tool (a plain checkpoint: `adapeft merge`)."""
    from cluster.commands.export.export import export as export_to
    from cluster.terminal.console import Terminal

    silence_libraries()
    export_to(path, to, model, out, Terminal(), servable=servable, revision=revision)
