"""Environment variables of workers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from adapeft.sections.cluster import Cluster
from cluster.launch.resources import COMPACT, FEW_KERNELS, RETURNING, environment_of

ON_CPU = {"GLIBC_TUNABLES": COMPACT, **FEW_KERNELS}
ALLOCATOR = {**ON_CPU, **RETURNING}


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, ALLOCATOR), ({"zero_stage": 2}, ON_CPU), ({"gpus_per_worker": 1}, {})],
)
def test_memory_is_set_on_a_cpu(settings, expected):
    environment = environment_of(Cluster(**settings))
    assert {name: environment[name] for name in ALLOCATOR if name in environment} == expected


def test_a_users_allocator_settings_win(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "12345678")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mxfast=64")
    environment = environment_of(Cluster())
    assert environment["MALLOC_MMAP_THRESHOLD_"] == "12345678"
    assert environment["MALLOC_TRIM_THRESHOLD_"] == RETURNING["MALLOC_TRIM_THRESHOLD_"]
    assert environment["GLIBC_TUNABLES"] == f"{COMPACT}:glibc.malloc.mxfast=64"  # glibc takes the last value


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it is glibc's that says what is in use")
def test_batches_of_new_lengths_take_no_more_memory():
    def growth(environment):
        call = "from tests.on_ranks.functions import multiply_shapes; print(multiply_shapes())"
        return int(subprocess.check_output([sys.executable, "-c", call], env=os.environ | environment))

    if growth({}) < 2**24:
        pytest.skip("this CPU multiplies bfloat16 matrices without oneDNN")
    assert growth(environment_of(Cluster())) < 2**23


def test_the_environment_of_a_worker_is_that_of_its_own_workers(monkeypatch):
    environment = environment_of(Cluster())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert environment_of(Cluster()) == environment
