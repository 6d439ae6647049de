"""Connection to the dashboard of a Ray cluster, which accepts jobs: its address, token and version."""

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
    """Ray's client with timeouts, because by default it waits for an answer forever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        timeout = _TIMEOUT if method == "GET" else _UPLOAD_TIMEOUT
        return super()._do_request(method, endpoint, timeout=timeout, **options)


@dataclass(frozen=True)
class Head:
    """The head of a cluster.

    Attributes:
        client: client that submits and lists jobs.
        address: address of its dashboard to show to the user, without a password.
        is_here: whether the head runs on this machine.
    """

    client: JobSubmissionClient
    address: str
    is_here: bool


def connect(address: str | None = None) -> Head:
    """Connect to the dashboard at ``address``, at the address in the environment, or on this machine.

    Raises:
        AdapeftError: no answer within seconds, the token is missing or wrong, or the server is no Ray dashboard.
    """
    name, address = _address(address)
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)
    # By Ray's order of precedence RAY_ADDRESS would override the given address.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    public = _without_password(address)
    shown = f"{name} = {public}"
    try:
        client = _Client(address)
        answer = client._do_request("GET", "/api/version").json()
        version, session = Version(answer["ray_version"]), str(answer["session_name"])
    except AuthenticationError as error:
        raise AdapeftError(f"{shown}: {_about_token(error)}") from None
    except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
        raise AdapeftError(
            f"{shown}: no Ray dashboard answers there. Start a cluster with `ray start --head`, or forward its port "
            "(see deploy/README.md), and give its address: --address http://HEAD:8265."
        ) from error
    except (requests.RequestException, RuntimeError, KeyError, ValueError) as error:
        raise AdapeftError(f"{shown}: the server there is no Ray dashboard: {first_line(error)}") from error
    if version < _OLDEST_RAY:
        raise AdapeftError(f"{shown}: the cluster runs Ray {version}, and adapeft needs {_OLDEST_RAY} or later.")
    return Head(client, public, is_here=Path(tempfile.gettempdir(), "ray", session).is_dir())


def _address(given: str | None) -> tuple[str, str]:
    """Return the name of the option or variable that gives the address, and the address."""
    name, address = "--address", given
    if address is None:
        name = next((name for name in _ADDRESS_VARIABLES if os.environ.get(name)), name)
        address = os.environ.get(name, DEFAULT_ADDRESS)
    if not address.startswith(("http://", "https://")):
        raise AdapeftError(
            f"{name} = {address}: must be the address of the dashboard, which begins with http:// or https:// and has "
            "port 8265, not 6379. Give --address http://HEAD:8265."
        )
    return name, address.rstrip("/")


def _about_token(error: AuthenticationError) -> str:
    message = str(error)
    if "Authentication required" in message:
        what = "the cluster requires a token"
    elif "Authentication failed" in message:
        what = "the cluster refuses this token"
    else:
        what = "RAY_AUTH_MODE=token, but there is no token"
    return (
        f"{what}. Set RAY_AUTH_MODE=token, and put the cluster's token into RAY_AUTH_TOKEN, ~/.ray/auth_token, or a "
        "file that RAY_AUTH_TOKEN_PATH names."
    )


def first_line(error: object) -> str:
    """Return the first line of an error's message, or the name of its class if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _without_password(address: str) -> str:
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
