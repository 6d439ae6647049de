"""Fixtures for every test."""

from __future__ import annotations

import gc
import os
import random
import tempfile
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    # The process that hands tests out to others needs neither library, and would import them before the others start.
    from transformers import BertForSequenceClassification, GPT2LMHeadModel

# Remove settings of the user, so that no test joins their cluster, writes into their store, formats output for their
# terminal, or sends requests for a local server to their proxy.
for _name in list(os.environ):
    if _name.startswith(("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_", "ADAPEFT_", "WANDB_", "MLFLOW_")):
        del os.environ[_name]
# A Ray that a test starts in this process would otherwise require the token in the user's home, create it if there is
# none, and set this variable, on which later tests then depend.
os.environ["RAY_AUTH_MODE"] = "disabled"
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


# The cache of data sets that the tests and their workers share, removed at the end: never that of the user.
_CACHE = tempfile.TemporaryDirectory(prefix="adapeft-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name


# Collecting garbage among the objects of the imported modules takes a fifth of the time in which tests are collected.
gc.set_threshold(20_000)


# Files of tests are handed out in this order: a long one that comes last would keep one of the workers busy alone.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("ranks") is None)


# Every fixture and every test has its own random seed, so weights do not depend on the order of tests.
@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.nodeid.rpartition("/")[2])


def _seed(name: str) -> None:
    import torch

    number = zlib.crc32(name.encode())
    random.seed(number)
    np.random.seed(number)
    # torch.manual_seed would also format the call stack for every kind of accelerator, even without one.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


@pytest.fixture
def bert() -> BertForSequenceClassification:
    from tests.support.tiny import make_bert

    return make_bert()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    from tests.support.tiny import make_gpt2

    return make_gpt2()
