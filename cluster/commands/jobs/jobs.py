"""Jobs of a Ray cluster: follow one, ask after it, end it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import aiohttp
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from adapeft.errors import AdapeftError, did_you_mean
from cluster.commands.jobs.dashboard import first_line
from cluster.failure import WorkerError

_RETRIES = 5
_NOT_INSTALLED = 127


def find(client: JobSubmissionClient, job: str) -> JobDetails:
    """What the cluster knows of a job.

    Raises:
        AdapeftError: it knows none of this id.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" not in str(error):
            raise WorkerError(f"the cluster does not tell of job {job}: {first_line(error)}") from error
        known = [other.submission_id for other in client.list_jobs() if other.submission_id]
        raise AdapeftError(f"{job}: no such job.{did_you_mean(job, known)} `adapeft status` lists them.") from error


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None], pause: float = 1.0) -> JobDetails:
    """Writes a job's output as it comes, from the beginning, until the job has ended; returns what became of it.

    A connection that breaks is taken up again where it broke, a few times with ``pause`` seconds between.

    Raises:
        WorkerError: the cluster is out of reach; the job may well go on.
    """
    reader = _Reader(client, job, write)
    failures = 0
    while True:
        seen = reader.position
        try:
            asyncio.run(reader.read())
            details = find(client, job)
            if details.status.is_terminal():
                return details
            failures = 0
        except (RuntimeError, ConnectionError, aiohttp.ClientError, requests.RequestException) as error:
            failures = 1 if reader.position > seen else failures + 1
            if failures > _RETRIES:
                raise WorkerError(
                    f"lost the cluster while following job {job}, which may go on: {first_line(error)}\n"
                    f"`adapeft logs {job} --follow` takes it up again."
                ) from error
        time.sleep(pause)


class _Reader:
    """Reads a log that always begins at its beginning, and writes what is new."""

    def __init__(self, client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> None:
        self.client, self.job, self.write = client, job, write
        self.position = 0  # characters written

    async def read(self) -> None:
        start = 0
        async for chunk in self.client.tail_job_logs(self.job):
            self.write(chunk[max(self.position - start, 0) :])
            start += len(chunk)
            self.position = max(self.position, start)


def check_outcome(details: JobDetails) -> None:
    """Says why a job has no result.

    Raises:
        AdapeftError: its user is to mend it.
        WorkerError: it failed or was stopped.
    """
    job = details.submission_id
    if details.status == JobStatus.STOPPED:
        raise WorkerError(f"job {job} was stopped; submitting the same run takes it up where it was.")
    if details.status != JobStatus.FAILED:
        return
    if details.driver_exit_code == 2:
        raise AdapeftError(f"job {job} was refused on the cluster, for the reason that its log ends with.")
    if details.driver_exit_code == _NOT_INSTALLED:
        raise WorkerError(
            f"job {job}: the cluster has no command `adapeft`. Use an image that has, as deploy/README.md says."
        )
    raise WorkerError(f"job {job} failed: {first_line(details.message or 'for no reason that Ray knows')}")


def stop(client: JobSubmissionClient, job: str, timeout: float = 30.0) -> JobStatus:
    """Ends a job and waits until it has ended; one that has is left alone.

    Raises:
        WorkerError: it has not after ``timeout`` seconds.
    """
    details = find(client, job)
    if details.status.is_terminal():
        return details.status
    client.stop_job(job)
    deadline = time.monotonic() + timeout
    while not (status := find(client, job).status).is_terminal():
        if time.monotonic() >= deadline:
            raise WorkerError(f"job {job} is still {status.lower()} {timeout:g} s after it was told to stop.")
        time.sleep(0.2)
    return status


def runs(client: JobSubmissionClient) -> Sequence[JobDetails]:
    """The cluster's jobs that ``submit`` sent, oldest first."""
    ours = [job for job in client.list_jobs() if job.submission_id and "adapeft" in (job.metadata or {})]
    return sorted(ours, key=lambda job: job.start_time or 0)
