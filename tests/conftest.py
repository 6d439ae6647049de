"""Fixtures for every test."""

from __future__ import annotations

import pytest
from transformers import BertForSequenceClassification, GPT2LMHeadModel

from tests.tiny import make_bert, make_gpt2


@pytest.fixture
def bert() -> BertForSequenceClassification:
    return make_bert()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return make_gpt2()
