"""Tests of masked language modeling: the blocks, which tokens are masked, and what is refused."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

import adapeft
from adapeft.errors import AdapeftError
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.masked_lm import Masking
from adapeft.tasks.registry import TASKS
from tests.support.tiny import VOCABULARY

TASK = TASKS["masked-lm"]
NAMES = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
ROWS = datasets.Dataset.from_list([{"text": text} for text in ("a b c d e", "f", "g h i j a b", "c d e")])


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(NAMES)}))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = special or {"mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", **special
    )


def tokenized(rows=ROWS, tokenizer=None, **options):
    data = TASK.data(train="a.jsonl", evaluation="a.jsonl", **options)
    return TASK.tokenize(rows, data, tokenizer or make_tokenizer())


def unmasked(batch) -> list[str]:
    """Return the texts of a batch with the labels in the place of the masks."""
    ids = torch.where(batch.labels == IGNORED, batch.inputs["input_ids"], batch.labels)
    return [" ".join(NAMES[number] for number in row) for row in ids.tolist()]


def test_blocks_have_special_tokens_around_them_and_a_separator_between_texts():
    data = tokenized(max_length=8)
    assert unmasked(data.collate([0, 1, 2])) == [
        "[CLS] a b c d e [SEP] [SEP]",
        "[CLS] f [SEP] g h i j [SEP]",
        "[CLS] a b [SEP] c d e [SEP]",
    ]
    assert len(data) == 3, "the last separator does not fill a block"


def test_masks_depend_on_the_example_and_the_epoch_alone():
    data = tokenized(max_length=8, mask_probability=0.5)
    together = data.collate([0, 1, 2])
    for order in ([2], [1, 0]):
        batch = data.collate(order)
        assert torch.equal(batch.inputs["input_ids"], together.inputs["input_ids"][order])
        assert torch.equal(batch.labels, together.labels[order])
    later = data.collate([0, 1, 2], epoch=1)
    assert not torch.equal(later.labels, together.labels)
    assert unmasked(later) == unmasked(together)
    assert len({tuple(row) for row in (data.collate([0, 1, 2]).labels == IGNORED).tolist()}) == 3


def test_tokens_are_masked_with_the_probabilities_of_bert():
    """Each fraction of n draws is within five standard errors, at most 5 / (2 √n), of its probability."""
    n = 40_000
    masking = Masking(0.3, mask=3, num_words=1000, special=(1, 2))
    row = np.where(np.arange(n + n // 2) % 3 == 0, 1, 999).tolist()
    drawn = masking({"input_ids": [row]}, [7], 0)
    tokens, read, labels = (np.array(found) for found in (row, drawn["input_ids"][0], drawn["labels"][0]))
    is_predicted = labels != IGNORED
    assert (labels[is_predicted] == 999).all()
    assert (read[~is_predicted] == tokens[~is_predicted]).all()
    assert is_predicted.sum() / n == pytest.approx(0.3, abs=5 / (2 * n**0.5))
    count = is_predicted.sum()
    kinds = {"mask": read == 3, "same": read == 999, "other": (read != 3) & (read != 999)}
    for kind, expected in (("mask", 0.8), ("same", 0.1), ("other", 0.1)):
        # A random word is the mask or the same word once in a thousand.
        found = (is_predicted & kinds[kind]).sum() / count
        assert found == pytest.approx(expected, abs=5 / (2 * count**0.5) + 1e-3), kind
    assert len(np.unique(read)) > 500, "any word may replace a token"


def test_at_least_one_token_is_predicted():
    drawn = Masking(1e-9, 3, 10, (1, 2))({"input_ids": [[1, 7, 8, 9, 2]] * 50}, range(50), 0)
    counts = [sum(label != IGNORED for label in labels) for labels in drawn["labels"]]
    assert counts == [1] * 50
    nothing = Masking(0.5, 3, 10, (1, 2))({"input_ids": [[1, 2, 2]]}, [0], 0)
    assert nothing == {"input_ids": [[1, 2, 2]], "labels": [[IGNORED] * 3]}


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(AdapeftError, match=r"has no mask token\. Name an encoder"):
        tokenized(tokenizer=make_tokenizer(unk_token="[MASK]"))


def test_blocks_need_room_for_a_token():
    with pytest.raises(AdapeftError, match=r"a block has 2 special tokens around its text.*at least 3"):
        tokenized(max_length=2)
    assert unmasked(tokenized(max_length=3).collate([0])) == ["[CLS] a [SEP]"]


def test_select_takes_the_batches_of_the_collator_of_transformers():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes))
    collate = DataCollatorForLanguageModeling(make_tokenizer(), mlm_probability=0.5, seed=0)
    examples = [{"input_ids": [1, *range(4 + shift, 10 + shift), 2]} for shift in (0, 1, 2, 3)]
    subset = adapeft.select(model, [collate(examples), collate(examples)], budget=100)
    assert 0 < subset.count <= 100
