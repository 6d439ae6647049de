"""A fixture for all tests of inspecting a config."""

from __future__ import annotations

import pytest
import ray


@pytest.fixture(autouse=True)
def without_workers(monkeypatch):
    def must_not_be_called(*_, **__):
        raise AssertionError("workers start for what they cannot do")

    monkeypatch.setattr(ray, "init", must_not_be_called)
