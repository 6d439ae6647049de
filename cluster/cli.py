"""The command ``adapeft``: the flow and its stages, methods side by side, subsets and deltas and their further life."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from adapeft.errors import AdapeftError
from cluster.commands.delta import cli as delta_cli
from cluster.commands.jobs.cli import add_commands
from cluster.commands.subsets import cli as subsets_cli
from cluster.failure import WorkerError
from cluster.terminal.exit_status import EPILOG, ExitStatus

# What a command needs beyond this is imported in it: torch takes seconds, and the config is judged before.
if TYPE_CHECKING:
    from cluster.run.session import Session

app = typer.Typer(
    help="Find which parameters are worth training within a budget, train only those, ship a small delta.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(delta_cli.app, name="delta")
app.add_typer(subsets_cli.app, name="subsets")

ConfigPath = Annotated[Path, typer.Argument(help="YAML config; `adapeft config` prints one with every key")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as budget=1% or select.method=sam")]


def main() -> None:
    """Runs the command; what it ends with is in ``exit_status``."""
    try:
        app()
    except AdapeftError as error:
        _end("error", str(error), ExitStatus.REFUSED)
    except WorkerError as error:
        _end("failed", str(error), ExitStatus.FAILED)


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure, choose, train, evaluate; takes up again what the same run has finished."""
    with _session(config, overrides) as session:
        from cluster.run import pipeline

        pipeline.run(session)


@app.command()
def select(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure and choose; with select.statistics=RUN choose again from what another run measured, in seconds."""
    with _session(config, overrides) as session:
        from cluster.run import pipeline

        pipeline.select(session)


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the subset that is in the run's folder, or the one that train.subset names."""
    with _session(config, overrides) as session:
        from cluster.run import pipeline

        if not session.folder.subset.is_file() and session.config.train.subset is None:
            raise AdapeftError(
                f"output = {session.folder.path} has no subset.safetensors: run `adapeft select` first, or name one: "
                f"train.subset=PATH, URL or NAME."
            )
        pipeline.train(session, pipeline.select(session))


@app.command()
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    delta: Annotated[Path | None, typer.Option(help="delta to apply; the run's own when left out")] = None,
    base: Annotated[bool, typer.Option("--base", help="evaluate the base model without any delta")] = False,
) -> None:
    """Score base and delta on the evaluation data."""
    with _session(config, overrides, claims=False) as session:
        from cluster.run import pipeline

        chosen = delta or session.folder.delta
        if not base and not chosen.is_file():
            raise AdapeftError(f"{chosen}: no such delta. Train first, or give --delta PATH or --base.")
        pipeline.evaluate(session, delta and delta.resolve(), base=base)


@app.command()
def compare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run methods=[…] at budgets=[…] under seeds=[…] and write a table and plots; goes on where it stopped."""
    from adapeft.config.experiments import load_comparison
    from cluster.terminal.console import Terminal

    (comparison, loaded), terminal = load_comparison(config, overrides or []), Terminal()
    with terminal.busy("loading libraries"):
        from cluster.commands.compare.compare import check, compare, finished
        from cluster.commands.compare.report import write_report
        from cluster.inspection.inspect import inspect

        _silence_libraries()
    with terminal.busy("checking config, data and model"):
        check(loaded, comparison, inspect)
    runs = compare(loaded, comparison, terminal.note)
    report = write_report(Path(loaded.output), loaded, comparison, runs)
    terminal.show_markdown(report.read_text(encoding="utf-8"))
    terminal.note(f"table and plots: {report.parent}/")
    if not finished(runs):
        sys.exit(ExitStatus.FAILED)


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train random subsets briefly and say how well each estimator foretold their gain (subsets=, steps= …)."""
    from adapeft.config.experiments import Trials
    from adapeft.config.load import load_config, parse_section

    trials, others = parse_section(Trials, overrides or [])
    trials.check(load_config(config, others))  # before anything is written
    with _session(config, others) as session:
        from cluster.run import pipeline

        pipeline.validate(session, trials)


@app.command()
def transfer(
    source: Annotated[Path, typer.Option("--from", help="folder of the run that measured")],
    model: Annotated[str, typer.Option("--to", help="model to choose for: folder (its config will do) or hub name")],
    overrides: Overrides = None,
) -> None:
    """Choose for another size of the model from a run's statistics (budget=, groups=tensor, inside=, verify=true)."""
    from adapeft.config.experiments import Transfer
    from adapeft.config.load import parse_section
    from cluster.terminal.console import Terminal

    settings, others = parse_section(Transfer, overrides or [])
    terminal = Terminal()
    with terminal.busy("loading libraries"):
        from cluster.commands import transfer as transferring

        _silence_libraries()
    transferring.run(source, model, settings, others, terminal)


@app.command()
def horizons(
    run: Annotated[Path, typer.Argument(help="folder of a run that measured with select.probe_steps")],
    budget: Annotated[str | None, typer.Option(help="another than the run's, such as 1%")] = None,
) -> None:
    """Say how long a choice stays good: what each point of the probe chooses, held against the others' best."""
    from cluster.commands.horizons import horizons as across
    from cluster.terminal.console import Terminal

    across(run, budget, Terminal())


@app.command()
def estimate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Say what measuring and training will hold on each device, by part, ZeRO stage and number of workers."""
    from adapeft.config.load import load_config
    from cluster.terminal.console import Terminal

    loaded, terminal = load_config(config, overrides or []), Terminal()
    with terminal.busy("loading libraries"):
        from cluster.commands.estimate import show_estimate
        from cluster.inspection.estimate import estimate_of, unknowns
        from cluster.inspection.inspect import inspect
        from cluster.zero.settings import zero_of

        _silence_libraries()
    with terminal.busy("running the model without its weights"):
        zero, found = zero_of(loaded.cluster), estimate_of(loaded, inspect(loaded))
        loads, grid, uncounted = found.loads(zero), found.grid(zero), unknowns(found, zero)
    show_estimate(loads, zero, grid, terminal)
    for line in uncounted:
        terminal.note(line)
    if loaded.cluster.workers > zero.workers:
        terminal.note(f"{zero.workers} workers are the fewest of cluster.min_workers to cluster.workers, and hold most")


@app.command()
def merge(
    delta: Annotated[str, typer.Argument(help="delta.safetensors of a run: path or URL")],
    model: Annotated[str, typer.Option(help="base model: folder or hub name")],
    out: Annotated[Path, typer.Option(help="folder to write, new or empty")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; left out, the base's own, which may be coarse")
    ] = None,
) -> None:
    """Write base + delta as a plain Hugging Face checkpoint, a shard at a time."""
    from adapeft.deltas.delta import Delta
    from adapeft.deltas.merge import merge as merge_into
    from adapeft.subset.locate import locate
    from cluster.terminal.console import Terminal

    _silence_libraries()
    with Terminal.on_stderr().noting():
        merged = merge_into(Delta.load(locate(delta)), model, out, dtype)
    print(merged)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="delta.safetensors of a run, or a subset where no values are needed")],
    to: Annotated[str, typer.Option(help="peft: an adapter; unfrozen-parameters: axolotl's list (no --model)")],
    out: Annotated[Path, typer.Option(help="folder to write, new or empty; for unfrozen-parameters a file")],
    model: Annotated[str | None, typer.Option(help="base model: folder or hub name")] = None,
) -> None:
    """Write a delta as other tools take it; as a plain checkpoint: adapeft merge."""
    from cluster.commands.export import export as export_to
    from cluster.terminal.console import Terminal

    _silence_libraries()
    export_to(path, to, model, out, Terminal())


@app.command("import")
def import_adapter(
    folder: Annotated[Path, typer.Argument(help="folder of a PEFT LoRA adapter")],
    model: Annotated[str, typer.Option(help="base model of the adapter: folder or hub name")],
    out: Annotated[Path, typer.Option(help="delta.safetensors to write")],
    task: Annotated[
        str | None, typer.Option(help="sequence-classification or causal-lm; left out, the adapter's")
    ] = None,
) -> None:
    """Make a delta of a PEFT LoRA adapter."""
    from adapeft.formats.peft.reader import load_from_peft

    if out.exists():
        raise AdapeftError(f"--out {out}: there already. Give a new file.")
    _silence_libraries()
    load_from_peft(folder, model, task).save(out)
    print(out)


@app.command()
def show(
    path: Annotated[str, typer.Argument(help="a run's folder or URL, a subset (or its name in the store) or a delta")],
) -> None:
    """Say what is in a run's folder, a subset or a delta."""
    from cluster.commands.show import show as show_path
    from cluster.terminal.console import Terminal

    show_path(path, Terminal())


@app.command()
def methods() -> None:
    """List the methods: what each trains, what choosing costs, where it comes from."""
    from adapeft.methods.registry import METHODS
    from cluster.terminal.console import Terminal

    Terminal().show_methods(METHODS)


@app.command()
def config(
    path: Annotated[Path | None, typer.Argument(help="config to check; left out, the defaults are printed")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema")] = False,
) -> None:
    """Check a config and print it whole, or print every key with its default."""
    from adapeft.config.load import defaults_yaml, json_schema, load_config, to_yaml

    if schema:
        print(json.dumps(json_schema(), indent=2))
    elif path is None:
        print(defaults_yaml(), end="")
    else:
        print(to_yaml(load_config(path, overrides or [])), end="")


add_commands(app)


@contextmanager
def _session(config: Path, overrides: list[str] | None, *, claims: bool = True) -> Iterator[Session]:
    from adapeft.config.load import load_config
    from cluster.terminal.console import Terminal, short

    loaded, terminal = load_config(config, overrides or []), Terminal()
    with terminal.busy("loading libraries"):
        from cluster.run.session import Session

        _silence_libraries()
    with Session(loaded, terminal, claims=claims) as session:
        try:
            yield session
        except KeyboardInterrupt:
            session.interrupted()
            if claims:
                terminal.note(f"stopped; the same command goes on with what is in {short(session.folder.path)}")
            # A thread is waiting inside Ray: any tidier end crashes in it. A local Ray ends with this process.
            sys.stdout.flush()
            os._exit(ExitStatus.INTERRUPTED)


def _silence_libraries() -> None:
    """What libraries have to say goes to the ranks' logs: this terminal is for progress."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()


def _end(kind: str, message: str, status: ExitStatus) -> None:
    Console(stderr=True).print(Text.assemble((kind, "bold red"), f" {message}"), soft_wrap=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
