"""Fixtures for tests of the command: a config, the command in this process, and a local S3 server."""

from __future__ import annotations

import sys
from typing import NamedTuple
from uuid import uuid4

import fsspec
import pytest

from cluster.cli import main
from tests.support.checkpoints import write_bert, write_colours, write_config


class Said(NamedTuple):
    """Result of a command, with the field names of ``subprocess.CompletedProcess``."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return the path of a config, in a folder with a tiny model and its data."""
    folder = tmp_path_factory.mktemp("files")
    return write_config(folder / "run.yaml", write_bert(folder / "base"), *write_colours(folder))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process, where libraries are already loaded; not for commands that start Ray."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["adapeft", *map(str, arguments)])
        capsys.readouterr()  # what libraries printed for the test itself, such as DeepSpeed at its first import
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return Said(int(end.value.code or 0), said.out, said.err)

    return run


class S3Server:
    """A local S3 server that can refuse requests.

    Attributes:
        refusals: number of next puts to refuse.
    """

    def __init__(self, running) -> None:
        self.url = "http://{}:{}".format(*running.get_host_and_port())
        self.refusals = 0
        self._answer, running._server.app = running._server.app, self

    def __call__(self, environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and self.refusals:
            self.refusals -= 1
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return self._answer(environ, start_response)


@pytest.fixture(scope="session")
def s3_server():
    """Return one S3 server for all tests."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield S3Server(running)
    running.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """Return the URL of an empty bucket, and set the environment with which this and child processes reach it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{uuid4().hex}"
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir(name)
    return f"s3://{name}"
