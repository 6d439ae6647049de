"""Two network namespaces on one machine that are connected only to each other, as two machines by a cable."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest


class Namespace(NamedTuple):
    """One of the two namespaces."""

    name: str
    interface: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs ``arguments`` in the namespace."""
        return ["ip", "netns", "exec", self.name, *arguments]


@contextmanager
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Yield both namespaces, or skip the test without permission; kill processes left in them at the end."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces require the command `ip` (iproute2)")
    here = os.getpid()
    ends = tuple(Namespace(f"adapeft-{here}-{n}", f"ad{here}-{n}", f"10.201.0.{n}") for n in (1, 2))
    made = []
    try:
        try:
            for end in ends:
                _ip("netns", "add", end.name)
                made.append(end)
                _ip("-n", end.name, "link", "set", "lo", "up")
            one, two = ends
            _ip(
                *("link", "add", one.interface, "netns", one.name, "type", "veth"),
                *("peer", "name", two.interface, "netns", two.name),
            )
            for end, other in ((one, two), (two, one)):
                _ip("-n", end.name, "address", "add", f"{end.address}/24", "dev", end.interface)
                _ip("-n", end.name, "link", "set", end.interface, "up")
                # Ray determines its own address from the default route.
                _ip("-n", end.name, "route", "add", "default", "via", other.address)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot create network namespaces: {error.stderr.strip()}")
        yield one, two
    finally:
        for end in made:
            for pid in _ip("netns", "pids", end.name).split():
                os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.5)
            _ip("netns", "delete", end.name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
