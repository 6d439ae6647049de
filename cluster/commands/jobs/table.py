"""Tables of the jobs of a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from ray.job_submission import JobDetails

from cluster.terminal.console import Terminal, plain_table


def show_jobs(jobs: Sequence[JobDetails], terminal: Terminal) -> None:
    """Print a table with one row per job."""
    table = plain_table()
    for title in ("job", "status", "started", "model", "method", "budget", "output"):
        table.add_column(title, overflow="fold")
    for job in jobs:
        metadata = job.metadata or {}
        run = (metadata["model"], metadata["method"], metadata["budget"], metadata["output"])
        started = "" if job.start_time is None else _time(job.start_time)
        table.add_row(job.submission_id, job.status.lower(), started, *run)
    terminal.console.print(table)


def show_job(job: JobDetails, terminal: Terminal) -> None:
    """Print the run, the status and the message of a job."""
    metadata = job.metadata or {}
    started = "" if job.start_time is None else f", started {_time(job.start_time)}"
    ended = "" if job.end_time is None else f", ended {_time(job.end_time)}"
    run: dict[str, str | tuple[str, ...]] = {
        name: metadata[name] for name in ("output", "model", "method", "budget", "attempt") if name in metadata
    }
    # Ray puts the end of the log into its message.
    message = (job.message or "").strip().partition("\n")[0]
    terminal.pairs({"job": str(job.submission_id), "status": f"{job.status.lower()}{started}{ended}", **run})
    terminal.pairs({"message": message})


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M:%S")
