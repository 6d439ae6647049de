"""Jobs of a Ray cluster: find, follow, stop and list them."""

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
    """Return the details of a job.

    Raises:
        AdapeftError: no job has this id.
        WorkerError: the cluster does not answer the question.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" not in str(error):
            raise WorkerError(f"the cluster returned no details of job {job}: {first_line(error)}") from error
        known = [other.submission_id for other in client.list_jobs() if other.submission_id]
        raise AdapeftError(f"{job}: no such job.{did_you_mean(job, known)} `adapeft status` lists them.") from error


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None], pause: float = 1.0) -> JobDetails:
    """Write a job's output from the beginning until the job ends, and return its details.

    A broken connection is resumed where it broke, up to ``_RETRIES`` times in a row with ``pause`` seconds between.

    Raises:
        WorkerError: the cluster cannot be reached; the job may still be running.
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
                    f"lost the connection to the cluster while following job {job}, which may still be running: "
                    f"{first_line(error)}\n`adapeft logs {job} --follow` follows it again."
                ) from error
        time.sleep(pause)


class _Reader:
    """Reads a log, which the cluster always sends from its beginning, and writes the new part."""

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
    """Check that a job has succeeded or is still running.

    Raises:
        AdapeftError: the job refused its input, which the user has to fix.
        WorkerError: the job failed or was stopped.
    """
    job = details.submission_id
    if details.status == JobStatus.STOPPED:
        raise WorkerError(f"job {job} was stopped. Submit the same run again to resume it.")
    if details.status != JobStatus.FAILED:
        return
    if details.driver_exit_code == 2:
        raise AdapeftError(f"job {job}: its input was refused on the cluster. The end of its log has the reason.")
    if details.driver_exit_code == _NOT_INSTALLED:
        raise WorkerError(
            f"job {job}: the cluster has no command `adapeft`. Use an image that has it (see deploy/README.md)."
        )
    raise WorkerError(f"job {job} failed: {first_line(details.message or 'Ray gives no reason')}")


def stop(client: JobSubmissionClient, job: str, timeout: float = 30.0) -> JobStatus:
    """Stop a job, wait until it has ended and return its status; a job that has ended is left alone.

    Raises:
        WorkerError: the job has not ended after ``timeout`` seconds.
    """
    details = find(client, job)
    if details.status.is_terminal():
        return details.status
    client.stop_job(job)
    deadline = time.monotonic() + timeout
    while not (status := find(client, job).status).is_terminal():
        if time.monotonic() >= deadline:
            raise WorkerError(f"job {job} is still {status.lower()} {timeout:g} s after the request to stop.")
        time.sleep(0.2)
    return status


def runs(client: JobSubmissionClient) -> Sequence[JobDetails]:
    """Return the jobs of the cluster that were sent by ``submit``, oldest first."""
    ours = [job for job in client.list_jobs() if job.submission_id and "adapeft" in (job.metadata or {})]
    return sorted(ours, key=lambda job: job.start_time or 0)
