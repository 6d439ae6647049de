"""The key of a tokenizer; that its content counts is in tests/adapeft/data/test_cache.py."""

from __future__ import annotations

from transformers import AutoTokenizer, ByT5Tokenizer

from adapeft.tasks.tokens.tokenizer_state import tokenizer_key
from tests.adapeft.data.test_description import tokenizer


def test_the_folder_does_not_count(tmp_path):
    for number, own in enumerate((ByT5Tokenizer(), tokenizer())):
        for name in ("one", "two"):
            own.save_pretrained(tmp_path / f"{name}{number}")
        keys = [tokenizer_key(AutoTokenizer.from_pretrained(tmp_path / f"{name}{number}")) for name in ("one", "two")]
        assert keys[0] == keys[1]


def test_options_of_a_tokenizer_in_python_count():
    keys = [tokenizer_key(ByT5Tokenizer(extra_ids=number))["content"] for number in (5, 6)]
    assert keys[0] != keys[1]


def test_special_tokens_and_class_count():
    own, other, name = tokenizer(), tokenizer(), tokenizer()
    other.eos_token = "fish"
    name.__class__ = type("Other", (type(name),), {})
    assert len({str(tokenizer_key(one)) for one in (own, other, name)}) == 3
