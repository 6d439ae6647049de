"""``adapeft delta``: compare, scale, add and average deltas of one base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapeft.errors import AdapeftError

if TYPE_CHECKING:
    from adapeft.deltas.delta import Delta

app = typer.Typer(
    help="Compare, scale, add and average deltas of one base model (`adapeft show` describes a single delta).",
    no_args_is_help=True,
)

DeltaPath = Annotated[Path, typer.Argument(help="delta.safetensors")]
DeltaPaths = Annotated[list[Path], typer.Argument(help="two or more delta.safetensors of one base model")]
Out = Annotated[Path, typer.Option(help="delta to write, a new file")]
Heads = Annotated[Path | None, typer.Option(help="delta whose new parameters (a head) are kept")]


@app.command()
def diff(a: DeltaPath, b: DeltaPath) -> None:
    """Show which entries two deltas both change, and where they change them in opposite directions.

    To subtract one from the other: `adapeft delta sum` with --weights 1 --weights -1.
    """
    _show_conflicts(_load([a, b]), [1.0, 1.0])


@app.command()
def scale(delta: DeltaPath, factor: Annotated[float, typer.Option(help="factor, any finite number")], out: Out) -> None:
    """Multiply a delta by a factor; a new head stays as it is."""
    from adapeft.deltas.arithmetic import sum_of

    _check_new(out)
    _write(sum_of(_load([delta]), [factor]), out)


@app.command("sum")
def add(
    deltas: DeltaPaths,
    out: Out,
    weights: Annotated[
        list[float] | None, typer.Option(help="weight of a delta; repeat it for each, in the same order; default: 1")
    ] = None,
    heads: Heads = None,
) -> None:
    """Add deltas, each multiplied by its weight."""
    from adapeft.deltas.arithmetic import sum_of

    _check_new(out)
    loaded, factors = _load(deltas), weights or [1.0] * len(deltas)
    result = sum_of(loaded, factors, None if heads is None else str(heads))
    _show_conflicts(loaded, factors)
    _write(result, out)


@app.command()
def interpolate(
    deltas: DeltaPaths,
    out: Out,
    weights: Annotated[
        list[float] | None,
        typer.Option(help="weight of a delta; repeat it for each, in the same order, with sum 1; default: equal"),
    ] = None,
    heads: Heads = None,
) -> None:
    """Average deltas with weights, and their heads if all have one for the same labels."""
    from adapeft.deltas.arithmetic import interpolation

    _check_new(out)
    loaded, shares = _load(deltas), weights or [1 / len(deltas)] * len(deltas)
    result = interpolation(loaded, shares, None if heads is None else str(heads))
    _show_conflicts(loaded, shares)
    _write(result, out)


def _check_new(out: Path) -> None:
    if out.exists():
        raise AdapeftError(f"--out {out}: exists already. Give a new path.")


def _load(paths: Sequence[Path]) -> dict[str, Delta]:
    from adapeft.deltas.delta import Delta

    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise AdapeftError(f"{twice[0]}: is given twice. Give it once, with the sum of both weights in --weights.")
    return {str(path): Delta.load(path) for path in paths}


def _show_conflicts(deltas: Mapping[str, Delta], weights: Sequence[float]) -> None:
    """Show the conflicts of the weighted deltas: entries that agree in a sum conflict in a difference."""
    from adapeft.deltas.arithmetic import scaled
    from adapeft.deltas.conflict import conflict_of
    from cluster.commands.delta.table import show_conflicts
    from cluster.terminal.console import Terminal

    turned = {
        name: delta if weight > 0 else scaled(delta, -1)
        for (name, delta), weight in zip(deltas.items(), weights, strict=True)
        if weight
    }
    conflicts = {pair: conflict_of(turned[pair[0]], turned[pair[1]]) for pair in combinations(turned, 2)}
    show_conflicts(conflicts, Terminal())


def _write(delta: Delta, out: Path) -> None:
    from adapeft.subset.store import hash_of
    from cluster.terminal.console import Terminal

    sources = [{**source, "sha256": hash_of(Path(source["name"]))} for source in delta.description["sources"]]
    replace(delta, description={**delta.description, "sources": sources}).save(out)
    Terminal().show_delta(delta, out)
