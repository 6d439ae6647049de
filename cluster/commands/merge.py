"""``adapeft merge``: write base + delta as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.terminal.silence import silence_libraries


def merge(
    delta: Annotated[str, typer.Argument(help="delta.safetensors of a run: path or URL")],
    model: Annotated[str, typer.Option(help="base model: folder or hub name")],
    out: Annotated[Path, typer.Option(help="folder to write, new or empty")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's, which may round the delta")
    ] = None,
) -> None:
    """Write base + delta as a plain Hugging Face checkpoint, shard by shard."""
    from adapeft.deltas.delta import Delta
    from adapeft.deltas.merge import merge as merge_into
    from adapeft.subset.locate import locate
    from cluster.terminal.console import Terminal

    silence_libraries()
    with Terminal.on_stderr().noting():
        merged = merge_into(Delta.load(locate(delta)), model, out, dtype)
    print(merged)
