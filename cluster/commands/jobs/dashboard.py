"""The dashboard of a Ray cluster, through which jobs are sent and asked after: its address, its token, its version."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from packaging.version import Version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from adapeft.errors import AdapeftError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_OLDEST_RAY = Version("2.54")
_TIMEOUT = 15.0
_UPLOAD_TIMEOUT = 120.0


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
        raise AdapeftError(f"{shown}: what answers there is no Ray dashboard: {first_line(error)}") from error
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


def first_line(error: object) -> str:
    """What an error says first, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _without_password(address: str) -> str:
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
