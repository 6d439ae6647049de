"""Environment variables of workers."""

from __future__ import annotations

import pytest

from adapeft.sections.cluster import Cluster
from cluster.launch.resources import COMPACT, RETURNING, environment_of

ALLOCATOR = {"GLIBC_TUNABLES": COMPACT, **RETURNING}


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, ALLOCATOR), ({"zero_stage": 2}, {"GLIBC_TUNABLES": COMPACT}), ({"gpus_per_worker": 1}, {})],
)
def test_the_allocator_is_set_on_a_cpu(settings, expected):
    environment = environment_of(Cluster(**settings))
    assert {name: environment[name] for name in ALLOCATOR if name in environment} == expected


def test_a_users_allocator_settings_win(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "12345678")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mxfast=64")
    environment = environment_of(Cluster())
    assert environment["MALLOC_MMAP_THRESHOLD_"] == "12345678"
    assert environment["MALLOC_TRIM_THRESHOLD_"] == RETURNING["MALLOC_TRIM_THRESHOLD_"]
    assert environment["GLIBC_TUNABLES"] == f"{COMPACT}:glibc.malloc.mxfast=64"  # glibc takes the last value


def test_the_environment_of_a_worker_is_that_of_its_own_workers(monkeypatch):
    environment = environment_of(Cluster())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert environment_of(Cluster()) == environment
