"""The ``adapeft`` command line: one line per command, in the order of the help.

A command imports everything beyond the standard library and typer only when it runs: importing torch takes seconds, and
a config is checked before that.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.text import Text

from adapeft.errors import AdapeftError
from cluster.commands.compare.cli import compare
from cluster.commands.config import config
from cluster.commands.delta import cli as delta_cli
from cluster.commands.doctor.cli import doctor
from cluster.commands.estimate.cli import estimate
from cluster.commands.evaluate import evaluate
from cluster.commands.export.cli import export
from cluster.commands.horizons.cli import horizons
from cluster.commands.import_adapter import import_adapter
from cluster.commands.jobs.cli import add_commands
from cluster.commands.merge import merge
from cluster.commands.methods import methods
from cluster.commands.push.cli import push
from cluster.commands.run import run
from cluster.commands.select import select
from cluster.commands.show.cli import show
from cluster.commands.subsets import cli as subsets_cli
from cluster.commands.train import train
from cluster.commands.transfer.cli import transfer
from cluster.commands.validate import validate
from cluster.failure import WorkerError
from cluster.terminal.exit_status import EPILOG, ExitStatus

app = typer.Typer(
    help="Find which parameters are worth training within a budget, train only those, and ship a small delta.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(delta_cli.app, name="delta")
app.add_typer(subsets_cli.app, name="subsets")
app.command()(run)
app.command()(select)
app.command()(train)
app.command()(evaluate)
app.command()(compare)
app.command()(validate)
app.command()(transfer)
app.command()(horizons)
app.command()(estimate)
app.command()(merge)
app.command()(export)
app.command("import")(import_adapter)
app.command()(push)
app.command()(show)
app.command()(methods)
app.command()(doctor)
app.command()(config)
add_commands(app)


def main() -> None:
    """Run the command; ``exit_status`` defines the statuses that it exits with."""
    try:
        app()
    except AdapeftError as error:
        _end("error", str(error), ExitStatus.REFUSED)
    except WorkerError as error:
        _end("failed", str(error), ExitStatus.FAILED)


def _end(kind: str, message: str, status: ExitStatus) -> None:
    Console(stderr=True).print(Text.assemble((kind, "bold red"), f" {message}"), soft_wrap=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
