"""The command ``adapeft subsets``: list, show, add and remove named subsets in a folder or bucket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapeft.errors import AdapeftError

if TYPE_CHECKING:
    from adapeft.subset.entry import Summary

app = typer.Typer(help="Named subsets in a folder or bucket: train.subset=NAME trains one.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="of the subset in the store")]
Store = Annotated[
    str | None,
    typer.Option(
        envvar="ADAPEFT_STORE", help="folder or URL such as s3://bucket/subsets; else ~/.local/share/adapeft/subsets"
    ),
]


@app.command("list")
def list_entries(
    store: Store = None,
    base: Annotated[str | None, typer.Option(help="only those whose base model's name holds this")] = None,
    task: Annotated[str | None, typer.Option(help="only those whose task or training data holds this")] = None,
    method: Annotated[str | None, typer.Option(help="only those of this method")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="name half-written entries too")] = False,
) -> None:
    """List the subsets: base model, method, size, data, score, fingerprint."""
    from adapeft.subset.store import HALF_WRITTEN, SubsetStore
    from cluster.commands.subsets.table import show_entries
    from cluster.terminal.console import Terminal

    terminal, opened = Terminal(), SubsetStore(store)
    entries, broken = opened.entries()
    wanted = [
        entry
        for entry in entries
        if (base or "") in (entry.summary.base or "")
        and (task or "") in f"{entry.summary.task} {entry.summary.data}"
        and method in (None, entry.summary.method)
    ]
    if wanted:
        show_entries(wanted, terminal)
    else:
        terminal.note(f"{opened.url}: no {'such ' if entries else ''}subsets")
    for name, reason in broken.items():
        if reason != HALF_WRITTEN:
            terminal.note(reason)
        elif show_all:
            terminal.note(f"{name!r} is {reason}: its writer is at work, or was interrupted")


@app.command()
def show(name: Name, store: Store = None) -> None:
    """Say where a subset comes from, what it scored and what it trains."""
    from adapeft.subset.store import SubsetStore
    from adapeft.subset.subset import Subset
    from cluster.commands.subsets.table import show_entry
    from cluster.terminal.console import Terminal

    terminal, opened = Terminal(), SubsetStore(store)
    entry = opened.get(name)
    subset = Subset.load(opened.fetch(entry))
    show_entry(entry, terminal)
    terminal.show_choice(subset)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="to give it: letters, digits, '.', '_', '-'")],
    source: Annotated[str, typer.Argument(help="folder of a run, or a subset: file or URL")],
    store: Store = None,
) -> None:
    """Add a run's subset with its scores, or a bare subset file; a name that is taken is refused."""
    from adapeft.subset.store import SubsetStore
    from cluster.terminal.console import Terminal

    opened = SubsetStore(store)
    entry = opened.add(name, *_file_and_summary(source))
    Terminal().note(f"added {entry.name} to {opened.url}; to train it: train.subset={entry.name}")


@app.command()
def remove(
    name: Name,
    store: Store = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Remove a subset, whole or damaged; runs that trained it keep their copy."""
    from adapeft.subset.store import SubsetStore
    from cluster.terminal.console import Terminal

    opened = SubsetStore(store)
    if not yes:
        typer.confirm(f"Remove {name} from {opened.url}?", abort=True)
    opened.remove(name)
    Terminal().note(f"removed {name} from {opened.url}")


def _file_and_summary(source: str) -> tuple[Path, Summary]:
    """The subset's file, and what its run or its own header says of it.

    Raises:
        AdapeftError: neither a run with a subset nor a subset.
    """
    from adapeft.files.damage import load_json, reading
    from adapeft.subset.locate import locate
    from adapeft.subset.subset import Subset
    from cluster.output.folder import RunFolder

    if not Path(source).is_dir():
        path = locate(source)
        return path, Subset.load(path).summary()
    folder = RunFolder(Path(source))
    if not folder.config.is_file() or not folder.subset.is_file():
        raise AdapeftError(f"{source}: no run with a subset (config.yaml, subset.safetensors). Run select first.")
    metrics = load_json(folder.metrics, "what a run writes", "Run again.") if folder.metrics.is_file() else {}
    with reading(f"{folder.config}: cannot be read", "Run select again."):
        config = folder.config.read_text(encoding="utf-8")
    return folder.subset, Subset.load(folder.subset).summary(config, metrics)
