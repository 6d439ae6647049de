"""The command in this process, and a user's files that it works on."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest

from cluster.cli import main


class Said(NamedTuple):
    """What a command left behind."""

    status: int
    output: str
    errors: str


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process, where its libraries are loaded already."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["adapeft", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return Said(int(end.value.code or 0), said.out, said.err)

    return run
