"""Subcommands for jobs of a Ray cluster: submit, status, logs, stop."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapeft.errors import AdapeftError
from cluster.terminal.exit_status import ExitStatus

# Importing Ray takes a second, and the config is checked before.
if TYPE_CHECKING:
    from cluster.commands.jobs.dashboard import Head
    from cluster.terminal.console import Terminal

Address = Annotated[
    str | None,
    typer.Option(
        help="dashboard of the cluster, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine"
    ),
]
Job = Annotated[str, typer.Argument(help="id that `adapeft submit` printed")]


def add_commands(app: typer.Typer) -> None:
    for command in (submit, status, logs, stop):
        app.command()(command)


def submit(
    config: Annotated[Path, typer.Argument(help="YAML config of the run")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="keys to override as key=value, as for `adapeft run`")
    ] = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the job until it ends")] = True,
    working_dir: Annotated[
        Path, typer.Option(help="folder whose files are sent if the config names them; others must be on the cluster")
    ] = Path(),
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the job's processes; no secrets")] = None,
    entrypoint_num_cpus: Annotated[
        float, typer.Option(min=0, help="CPU cores reserved for the job's own process; 0: it runs on the head node")
    ] = 0,
) -> None:
    """Run a config on a cluster as a Ray job; submit it again to resume it after a failure or a stop."""
    from adapeft.config.load import read_config

    loaded, variables = read_config(config, overrides or []), _variables(env or [])
    with _cluster(address) as (head, terminal):
        from cluster.commands.jobs.package import pack
        from cluster.commands.jobs.submit import submit as send

        package = pack(loaded, working_dir, is_here=head.is_here)
        for line in package.unseen:
            print(line, file=sys.stderr)
        job = send(head.client, package, variables, entrypoint_num_cpus)
        if not wait:
            print(job)
            return
        terminal.note(f"submitted job {job} to {head.address}")
        _follow(head, job, terminal)


def status(
    job: Annotated[str | None, typer.Argument(help="id of a job; default: list all submitted runs")] = None,
    address: Address = None,
) -> None:
    """Show the status of a job, or list all; exits with 1 if the job failed or was stopped."""
    with _cluster(address) as (head, terminal):
        from cluster.commands.jobs import jobs
        from cluster.commands.jobs.table import show_job, show_jobs

        if job is None:
            show_jobs(jobs.runs(head.client), terminal)
        else:
            details = jobs.find(head.client, job)
            show_job(details, terminal)
            jobs.check_outcome(details)


def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="keep printing until the job ends")] = False,
) -> None:
    """Print the output of a job so far, including its progress."""
    with _cluster(address) as (head, terminal):
        from cluster.commands.jobs import jobs

        jobs.find(head.client, job)
        if follow:
            _follow(head, job, terminal)
        else:
            _write(head.client.get_job_logs(job))


def stop(job: Job, address: Address = None) -> None:
    """Stop a job; submit the same run again to resume it."""
    with _cluster(address) as (head, terminal):
        from cluster.commands.jobs import jobs

        terminal.note(f"job {job}: {jobs.stop(head.client, job).lower()}")


@contextmanager
def _cluster(address: str | None) -> Iterator[tuple[Head, Terminal]]:
    from cluster.terminal.console import Terminal

    terminal = Terminal()
    with terminal.console.status("reaching the cluster …"):
        from cluster.commands.jobs.dashboard import connect

        head = connect(address)
    yield head, terminal


def _follow(head: Head, job: str, terminal: Terminal) -> None:
    from cluster.commands.jobs import jobs

    try:
        details = jobs.follow(head.client, job, _write)
    except KeyboardInterrupt:
        terminal.note(
            f"job {job} is still running; `adapeft logs {job} --follow` follows it, `adapeft stop {job}` stops it"
        )
        sys.exit(ExitStatus.INTERRUPTED)
    jobs.check_outcome(details)
    terminal.note(f"job {job}: {details.status.lower()}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _variables(assignments: list[str]) -> dict[str, str]:
    variables = dict(assignment.partition("=")[::2] for assignment in assignments)
    for assignment in assignments:
        if not assignment.partition("=")[0] or "=" not in assignment:
            raise AdapeftError(f"--env {assignment}: should be NAME=VALUE.")
    return variables
