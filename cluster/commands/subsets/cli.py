"""The command ``adapeft subsets``: list, show, add and remove named subsets in a folder or bucket."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapeft.errors import AdapeftError

if TYPE_CHECKING:
    from adapeft.subset.entry import Summary

app = typer.Typer(
    help="Store named subsets in a folder or bucket; train.subset=NAME trains one of them.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="name of the subset in the store")]
Store = Annotated[
    str | None,
    typer.Option(
        envvar="ADAPEFT_STORE",
        help="folder or URL of the store, such as s3://bucket/subsets; default: ~/.local/share/adapeft/subsets",
    ),
]


@app.command("list")
def list_entries(
    store: Store = None,
    base: Annotated[str | None, typer.Option(help="only subsets whose base model's name contains this")] = None,
    task: Annotated[str | None, typer.Option(help="only subsets whose task or training data contains this")] = None,
    method: Annotated[str | None, typer.Option(help="only subsets of this method")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="also name half-written entries")] = False,
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
            terminal.note(f"{name!r} is {reason}: the command that adds it is still running, or was interrupted")


@app.command()
def show(name: Name, store: Store = None) -> None:
    """Show the origin, the scores and the trained parameters of a subset."""
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
    name: Annotated[str, typer.Argument(help="new name, of letters, digits, '.', '_' and '-'")],
    source: Annotated[str, typer.Argument(help="folder of a run, or file or URL of a subset")],
    store: Store = None,
) -> None:
    """Add a run's subset with its scores, or a subset file; existing names are not overwritten."""
    from adapeft.subset.store import SubsetStore
    from cluster.terminal.console import Terminal

    opened = SubsetStore(store)
    entry = opened.add(name, *_file_and_summary(source))
    Terminal().note(f"added {entry.name} to {opened.url}; to train it: train.subset={entry.name}")


@app.command()
def remove(
    name: Name,
    store: Store = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask for confirmation")] = False,
) -> None:
    """Remove a subset, even a damaged one; runs that trained it keep their copy."""
    from adapeft.subset.store import SubsetStore
    from cluster.terminal.console import Terminal

    opened = SubsetStore(store)
    if not yes:
        typer.confirm(f"Remove {name} from {opened.url}?", abort=True)
    opened.remove(name)
    Terminal().note(f"removed {name} from {opened.url}")


def _file_and_summary(source: str) -> tuple[Path, Summary]:
    """Return the subset's file, and the summary from its run or its own header.

    Raises:
        AdapeftError: ``source`` is neither a run with a subset nor a subset.
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
    metrics = load_json(folder.metrics, "a run's metrics file", "Run again.") if folder.metrics.is_file() else {}
    with reading(f"{folder.config}: cannot be read", "Run select again."):
        config = folder.config.read_text(encoding="utf-8")
    return folder.subset, Subset.load(folder.subset).summary(config, metrics)
