"""Jobs of a Ray cluster: send a run there, follow it, ask after it, end it. All through the dashboard's port."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from packaging.version import Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from adapeft.config import Config
from adapeft.config_file import to_yaml
from adapeft.errors import AdapeftError, did_you_mean
from cluster.failure import WorkerError
from cluster.package import CONFIG, Package, has_password

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENTRYPOINT = f"adapeft run {CONFIG}"

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_OLDEST_RAY = Version("2.54")
_TIMEOUT = 15.0
_UPLOAD_TIMEOUT = 120.0
_RETRIES = 5
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY(_|$)")
_NOT_INSTALLED = 127

# --- reaching the cluster --------------------------------------------------------------------------------------------


class _Client(JobSubmissionClient):
    """Ray's client, which by itself waits for an answer for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        timeout = _TIMEOUT if method == "GET" else _UPLOAD_TIMEOUT
        return super()._do_request(method, endpoint, timeout=timeout, **options)


@dataclass(frozen=True)
class Head:
    """The head of a cluster.

    Attributes:
        client: takes and tells of jobs.
        address: of its dashboard, to be shown.
        is_here: whether it runs on this machine.
    """

    client: JobSubmissionClient
    address: str
    is_here: bool


def connect(address: str | None = None) -> Head:
    """Reaches the dashboard at ``address``, that of the environment, or one on this machine.

    Raises:
        AdapeftError: nobody answers within seconds, it wants another token, or it is no Ray that serves.
    """
    name, address = _address(address)
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)
    # Ray's own order of precedence would take RAY_ADDRESS before what was asked for.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    public = _without_password(address)
    shown = f"{name} = {public}"
    try:
        client = _Client(address)
        said = client._do_request("GET", "/api/version").json()
        version, session = Version(said["ray_version"]), str(said["session_name"])
    except AuthenticationError as error:
        raise AdapeftError(f"{shown}: {_about_token(error)}") from None
    except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
        raise AdapeftError(
            f"{shown}: no Ray dashboard answers there. Start a cluster with `ray start --head`, or forward its port, "
            "as deploy/README.md says, and give its address: --address http://HEAD:8265."
        ) from error
    except (requests.RequestException, RuntimeError, KeyError, ValueError) as error:
        raise AdapeftError(f"{shown}: what answers there is no Ray dashboard: {_first_line(error)}") from error
    if version < _OLDEST_RAY:
        raise AdapeftError(f"{shown}: the cluster runs Ray {version}; adapeft needs {_OLDEST_RAY} or later there.")
    return Head(client, public, is_here=Path(tempfile.gettempdir(), "ray", session).is_dir())


def _address(given: str | None) -> tuple[str, str]:
    """Where the address comes from, and the address."""
    name, address = "--address", given
    if address is None:
        name = next((name for name in _ADDRESS_VARIABLES if os.environ.get(name)), name)
        address = os.environ.get(name, DEFAULT_ADDRESS)
    if not address.startswith(("http://", "https://")):
        raise AdapeftError(
            f"{name} = {address}: jobs are sent to the dashboard, whose address begins with http:// or https:// and is "
            "that of the head with port 8265, not 6379. Give it: --address http://HEAD:8265."
        )
    return name, address.rstrip("/")


def _about_token(error: AuthenticationError) -> str:
    said = str(error)
    if "Authentication required" in said:
        what = "the cluster asks for a token"
    elif "Authentication failed" in said:
        what = "the cluster refuses this token"
    else:
        what = "RAY_AUTH_MODE=token, but there is no token"
    return (
        f"{what}. Set RAY_AUTH_MODE=token, and put the cluster's token into RAY_AUTH_TOKEN, ~/.ray/auth_token, or a "
        "file that RAY_AUTH_TOKEN_PATH names."
    )


# --- sending ---------------------------------------------------------------------------------------------------------


def submit(client: JobSubmissionClient, package: Package, variables: Mapping[str, str], num_cpus: float = 0) -> str:
    """Sends a run and returns its submission id, which a later attempt at the same run has too, with a number.

    Args:
        client: of the cluster.
        package: the run.
        variables: environment of the job and its workers.
        num_cpus: kept free for the job's own process, which then runs where they are; 0: on the head node.

    Raises:
        AdapeftError: the run, or another with its output, is there and has not ended; a variable looks like a secret.
    """
    _check_variables(variables)
    config = package.config
    name = submission_id(config)
    before = client.list_jobs()
    for other in before:
        if not other.status.is_terminal() and (other.metadata or {}).get("output") == config.output:
            job = other.submission_id
            raise AdapeftError(
                f"output = {config.output}: job {job} writes there and is {other.status.lower()}. Follow it with "
                f"`adapeft logs {job} --follow` or end it with `adapeft stop {job}`."
            )
    attempt = 1 + max((_attempt(name, job.submission_id) for job in before), default=0)
    with tempfile.TemporaryDirectory(prefix="adapeft-") as folder:
        package.write(Path(folder))
        try:
            return client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=name if attempt == 1 else f"{name}-{attempt}",
                runtime_env={"working_dir": folder, "env_vars": dict(variables)},
                metadata=_metadata(config, attempt),
                entrypoint_num_cpus=num_cpus or None,
            )
        except (RuntimeError, requests.RequestException) as error:
            # Of a traceback on the head it is the last line that says why.
            raise WorkerError(f"the cluster did not take the job: {str(error).strip().splitlines()[-1]}") from error


def submission_id(config: Config) -> str:
    """``mine-3fb1a8c0`` for output ``runs/mine``: the same for the same config, wherever it is sent from."""
    slug = re.sub(r"[^a-z0-9]+", "-", config.output.rstrip("/").rpartition("/")[2].lower()).strip("-")
    digest = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:8]
    return f"{slug[:40] or 'run'}-{digest}"


def _attempt(name: str, other: str | None) -> int:
    """Which attempt at run ``name`` a job is; 0 if it is none."""
    found = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", other or "")
    return int(found[1] or 1) if found else 0


def _metadata(config: Config, attempt: int) -> dict[str, str]:
    return {
        "adapeft": metadata.version("adapeft"),
        "output": config.output,
        "model": config.model.name,
        "method": config.select.method,
        "budget": str(config.select.budget),
        "attempt": str(attempt),
    }


def _check_variables(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if _SECRET_NAME.search(name.upper()) or has_password(value):
            raise AdapeftError(
                f"--env {name}: looks like a secret, and everyone who sees the job can read its environment. Give it "
                "to the cluster's machines instead, as deploy/README.md says."
            )


# --- following -------------------------------------------------------------------------------------------------------


def find(client: JobSubmissionClient, job: str) -> JobDetails:
    """What the cluster knows of a job.

    Raises:
        AdapeftError: it knows none of this id.
    """
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" not in str(error):
            raise WorkerError(f"the cluster does not tell of job {job}: {_first_line(error)}") from error
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
                    f"lost the cluster while following job {job}, which may go on: {_first_line(error)}\n"
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
    raise WorkerError(f"job {job} failed: {_first_line(details.message or 'for no reason that Ray knows')}")


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
    ours = [job for job in client.list_jobs() if "adapeft" in (job.metadata or {})]
    return sorted(ours, key=lambda job: job.start_time or 0)


# --- words -----------------------------------------------------------------------------------------------------------


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _without_password(address: str) -> str:
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
