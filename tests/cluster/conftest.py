"""A config to run, the command in this process, and a local server that speaks S3."""

from __future__ import annotations

import sys
from typing import NamedTuple
from uuid import uuid4

import fsspec
import pytest

from cluster.cli import main
from tests.support.checkpoints import write_bert, write_colours, write_config


class Said(NamedTuple):
    """What a command left behind, by the names that subprocess gives it."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Path of a run's config, with a tiny model and its data beside it."""
    folder = tmp_path_factory.mktemp("files")
    return write_config(folder / "run.yaml", write_bert(folder / "base"), *write_colours(folder))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process, where its libraries are loaded already; not for what starts Ray."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["adapeft", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return Said(int(end.value.code or 0), said.out, said.err)

    return run


class S3Server:
    """A local server that speaks S3.

    Attributes:
        refusals: how many more puts it will refuse.
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
    """A server for all tests."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield S3Server(running)
    running.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """URL of a bucket that is empty, and the environment in which this process and those it starts reach it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{uuid4().hex}"
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir(name)
    return f"s3://{name}"
