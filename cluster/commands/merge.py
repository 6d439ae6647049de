"""``adapeft merge``: write base + delta as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.push.cli import Private
from cluster.run.opening import opened
from cluster.terminal.silence import silence_libraries

if TYPE_CHECKING:
    from cluster.commands.push.repository import Repository
    from cluster.terminal.console import Terminal


def merge(
    delta: Annotated[str, typer.Argument(help="delta.safetensors of a run: path or URL")],
    model: Annotated[str, typer.Option(help="base model: folder or hub name")],
    out: Annotated[Path, typer.Option(help="folder to write, new or empty")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a base on the hub")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's, which may round the delta")
    ] = None,
    unquantized: Annotated[
        bool,
        typer.Option(
            "--unquantized",
            help="merge the delta of a quantized base into its unquantized checkpoint, as with QLoRA: another model",
        ),
    ] = False,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="config of the run: also report the scores of the delta on its base and of the merged model"),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="also upload the checkpoint, with a model card, to this repository on the hub")
    ] = None,
    private: Private = True,
) -> None:
    """Write base + delta as a plain Hugging Face checkpoint, shard by shard."""
    from adapeft.config.load import load_config
    from adapeft.deltas.delta import Delta
    from adapeft.deltas.merge import merge as merge_into
    from adapeft.subset.locate import locate
    from cluster.terminal.console import Terminal

    silence_libraries()
    terminal, path = Terminal.on_stderr(), locate(delta)
    if evaluate is not None:
        load_config(evaluate)
    repository = None if push is None else _checked(push, path, private=private)
    with terminal.noting():
        merged = merge_into(Delta.load(path), model, out, dtype, unquantized=unquantized, revision=revision)
    if evaluate is not None:
        _compare(evaluate, path, merged, terminal)
    elif unquantized:
        terminal.note(
            "This is another model than the one that was trained: with --evaluate CONFIG the scores of both are shown."
        )
    print(merged)
    if repository is not None:
        print(_upload(repository, path, merged, model))


def _checked(name: str, delta: Path, *, private: bool) -> Repository:
    from adapeft.subset.store import hash_of
    from cluster.commands.push.repository import Repository

    repository = Repository(name, private=private)
    repository.check(hash_of(delta))
    return repository


def _upload(repository: Repository, delta: Path, merged: Path, model: str) -> str:
    from adapeft.deltas.delta import Delta
    from adapeft.deltas.merge import REPORT
    from adapeft.files.damage import load_json
    from adapeft.subset.store import hash_of
    from cluster.commands.push.card import card_of_merged

    report = load_json(merged / REPORT, "a report of a merged checkpoint", "Merge again.")
    card = card_of_merged(Delta.load(delta), model, report, repository.name, hash_of(delta))
    files = {path.relative_to(merged).as_posix(): path for path in sorted(merged.rglob("*")) if path.is_file()}
    return repository.upload(files, card, "Upload a merged checkpoint")


def _compare(config: Path, delta: Path, merged: Path, terminal: Terminal) -> None:
    """Show the scores of the delta on its base and of the merged checkpoint, and add them to its report."""
    from adapeft.deltas.merge import add_scores
    from cluster.run import pipeline

    place = merged.resolve()
    with opened(config, None, claims=False, terminal=terminal) as session:
        on_base = pipeline.evaluate(session, delta.resolve(), base=False)
    dense = [f"model.name={place}", "model.revision=null", "model.quantization=none"]
    with opened(config, dense, claims=False, terminal=terminal) as session:
        of_merged = pipeline.evaluate(session, None, base=True)
    scores = {"delta": on_base, "merged": of_merged}
    add_scores(merged, scores)
    terminal.show_compared(scores)
