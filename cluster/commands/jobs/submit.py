"""Submit a run to a Ray cluster as a job, numbered after its earlier attempts."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import requests
from ray.job_submission import JobSubmissionClient

from adapeft.errors import AdapeftError
from adapeft.sections.paths import has_password
from cluster.commands.jobs.package import CONFIG, Package
from cluster.failure import WorkerError
from cluster.output.identity import job_metadata, run_id

ENTRYPOINT = f"adapeft run {CONFIG}"

_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASS|PASSWORD|PASSWD|CREDENTIAL|KEY)S?(_|$)")


def submit(client: JobSubmissionClient, package: Package, variables: Mapping[str, str], num_cpus: float = 0) -> str:
    """Submit a run and return its submission id; later attempts at the same run have the same id with a number.

    Args:
        client: client of the cluster.
        package: config and files of the run.
        variables: environment variables of the job and its workers.
        num_cpus: CPU cores reserved for the job's own process, on any node; with 0 it runs on the head node.

    Raises:
        AdapeftError: a job with the same output has not ended, or a variable looks like a secret.
        WorkerError: the cluster refuses the job.
    """
    _check_variables(variables)
    config = package.config
    name = run_id(config)
    before = client.list_jobs()
    for other in before:
        if not other.status.is_terminal() and (other.metadata or {}).get("output") == config.output:
            job = other.submission_id
            remedy = f"Follow it with `adapeft logs {job} --follow` or stop it with `adapeft stop {job}`."
            raise AdapeftError(
                f"output = {config.output}: job {job or other.job_id} writes there and is {other.status.lower()}. "
                + (remedy if job else "It was not submitted, so stop it where it was started.")
            )
    attempt = 1 + max((_attempt(name, job.submission_id) for job in before), default=0)
    with tempfile.TemporaryDirectory(prefix="adapeft-") as folder:
        package.write(Path(folder))
        try:
            return client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=name if attempt == 1 else f"{name}-{attempt}",
                runtime_env={"working_dir": folder, "env_vars": dict(variables)},
                metadata={**job_metadata(config, name), "attempt": str(attempt)},
                entrypoint_num_cpus=num_cpus or None,
            )
        except (RuntimeError, requests.RequestException) as error:
            # The message may be a traceback from the head, whose last line has the reason.
            raise WorkerError(f"the cluster refused the job: {str(error).strip().splitlines()[-1]}") from error


def _attempt(name: str, other: str | None) -> int:
    """Return the number of the attempt at run ``name`` that job ``other`` is; 0 if it is another run."""
    found = re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", other or "")
    return int(found[1] or 1) if found else 0


def _check_variables(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        if _SECRET_NAME.search(name.upper()) or has_password(value):
            raise AdapeftError(
                f"--env {name}: looks like a secret, and everyone who sees the job can read its environment. Set it on "
                "the cluster's machines instead (see deploy/README.md)."
            )
