"""Fixtures for every test."""

from __future__ import annotations

import os
import zlib

import pytest
from transformers import BertForSequenceClassification, GPT2LMHeadModel, set_seed

from tests.support.tiny import make_bert, make_gpt2

# What a user has set for their own work: no test joins their cluster, writes into their store, prints for their
# terminal, or asks their proxy for a server on this machine.
for _name in list(os.environ):
    if _name.startswith(("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_", "ADAPEFT_")):
        del os.environ[_name]
_PROXIES = [f"{scheme}_proxy" for scheme in ("http", "https", "all")]
for _name in (
    *_PROXIES,
    *map(str.upper, _PROXIES),
    "XDG_CACHE_HOME",
    "XDG_DATA_HOME",
    "COLUMNS",
    "LINES",
    "FORCE_COLOR",
    "NO_COLOR",
):
    os.environ.pop(_name, None)


# Every fixture and every test draws from its own seed: what ran before, in whatever order, changes no weight.
@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    set_seed(zlib.crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    set_seed(zlib.crc32(item.nodeid.rpartition("/")[2].encode()))


@pytest.fixture
def bert() -> BertForSequenceClassification:
    return make_bert()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return make_gpt2()
