"""Tokenization of texts and collation of batches; all inputs of a model are made here."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from adapeft.data.description import Batch
from adapeft.data.sources import quiet
from adapeft.errors import AdapeftError
from adapeft.tasks.objective import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedData:
    """The tokenized examples of a split.

    Attributes:
        rows: inputs of the model, not padded.
        labels: labels of the N examples in the format of ``Batch``, [N, …]; None for a language model, whose labels
            are its inputs.
        tokenizer: tokenizer that can pad.
        fixed_length: number of tokens of every batch; None: that of its longest example.
    """

    rows: datasets.Dataset
    labels: Tensor | None
    tokenizer: PreTrainedTokenizerBase
    fixed_length: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        return pc.list_value_length(self.rows.data.column("input_ids")).to_pylist()

    def collate(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return the examples at ``indices`` (at least one), padded on the tokenizer's padding side."""
        ids = torch.tensor([int(index) for index in indices])
        assert len(ids), "a batch has at least one example"
        columns = self.rows[ids.tolist()]
        padding = "longest" if self.fixed_length is None else "max_length"
        inputs = dict(
            self.tokenizer.pad(columns, padding, self.fixed_length, return_attention_mask=True, return_tensors="pt")
        )
        if self.labels is not None:
            return Batch(inputs, self.labels[ids], ids)
        return Batch(inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED), ids)


def _map(rows: datasets.Dataset, function: Any) -> datasets.Dataset:
    """Replace the columns of ``rows`` by those of ``function``, in memory: a cache on disk would be shared."""
    with quiet():
        return rows.map(
            function,
            batched=True,
            remove_columns=rows.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            # A unique fingerprint: otherwise ``datasets`` hashes the function and prints long warnings.
            new_fingerprint=uuid.uuid4().hex[:16],
        )


def examples_of(
    rows: datasets.Dataset, columns: Sequence[str], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """Tokenize one example per row: a text or a pair of texts with special tokens, truncated to ``max_length``.

    Args:
        rows: rows with the texts.
        columns: one or two columns of texts, the first that of ``data.text``.
        max_length: maximum number of tokens.
        tokenizer: tokenizer that can pad.

    Raises:
        AdapeftError: ``max_length`` leaves no token of a text, or a row has no token.
    """
    is_pair = len(columns) == 2
    num_special = tokenizer.num_special_tokens_to_add(is_pair)
    # Below that, tokenizers truncate texts to nothing, or do not truncate them at all.
    if max_length < (shortest := num_special + 1 + is_pair):
        raise AdapeftError(
            f"data.max_length = {max_length}: an example has {num_special} special tokens around its text"
            f"{'s' * is_pair}, so no token of {'both' if is_pair else 'it'} is left. Raise it to at least {shortest}."
        )

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        return dict(tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length))

    encoded = _map(rows, encode)
    lengths = pc.list_value_length(encoded.data.column("input_ids")).to_numpy()
    if not lengths.all():
        # Only tokenizers without special tokens, such as GPT-2's, return no tokens for an empty text.
        raise AdapeftError(
            f"data.text = {columns[0]!r}: row {int(lengths.argmin())} (counted from 0) has no tokens "
            f"({int((lengths == 0).sum())} of {len(lengths)} rows have none). Drop such rows."
        )
    return encoded


def blocks_of(
    rows: datasets.Dataset, column: str, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """Return blocks of exactly ``max_length`` tokens.

    Texts are tokenized without special tokens, joined and split into blocks; the remainder is dropped. The
    end-of-text token follows each text, except in .txt files, whose rows are lines of one text.

    Args:
        rows: rows with the texts.
        column: column of the texts.
        max_length: number of tokens per block.
        tokenizer: tokenizer of the model.

    Raises:
        AdapeftError: a block of that length has no predictions, or the texts have too few tokens for one block.
    """
    if max_length < 2:
        raise AdapeftError(
            f"data.max_length = {max_length}: the first token of a block is not predicted, so blocks of this length "
            "have no loss. Raise it to at least 2."
        )
    is_one_text = rows.builder_name == "text"
    end = [] if is_one_text or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # No warning: a text may be longer than the model's context, it is split into blocks below.
        texts = tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [tokens + end for tokens in texts if tokens]}

    tokens = pc.list_flatten(_map(rows, encode).data.column("input_ids")).to_numpy()
    num_blocks = len(tokens) // max_length
    if num_blocks == 0:
        raise AdapeftError(
            f"data.max_length = {max_length}: the texts have only {len(tokens)} tokens, less than one block. Lower "
            "data.max_length or give more text."
        )
    blocks = tokens[: num_blocks * max_length].reshape(num_blocks, max_length)
    return datasets.Dataset.from_dict({"input_ids": blocks})
