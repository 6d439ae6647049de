"""Texts as token ids, and batches of them: the one way in which examples reach a model."""

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
    """Every example of a split, tokenized.

    ``rows`` hold the model's inputs, not padded; ``labels`` [N, …] are those of the N examples as ``Batch``
    has them, None for a language model, whose labels are its inputs. ``tokenizer`` can pad. Every batch has
    ``fixed_length`` tokens, or where that is None those of its longest example.
    """

    rows: datasets.Dataset
    labels: Tensor | None
    tokenizer: PreTrainedTokenizerBase
    fixed_length: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return pc.list_value_length(self.rows.data.column("input_ids")).to_pylist()

    def collate(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The examples at ``indices`` (one at least), padded on the tokenizer's side."""
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
    """``rows`` with ``function``'s columns in place of their own, kept in memory: a cache on disk would be shared."""
    with quiet():
        return rows.map(
            function,
            batched=True,
            remove_columns=rows.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            # A name of its own for the result: else ``datasets`` hashes the function, and complains at length.
            new_fingerprint=uuid.uuid4().hex[:16],
        )


def examples_of(
    rows: datasets.Dataset, columns: Sequence[str], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """One example per row: a text or a pair of them with the special tokens around, cut to ``max_length``.

    Args:
        rows: with the texts.
        columns: one of them or two, the first that of ``data.text``.
        max_length: in tokens.
        tokenizer: that can pad.

    Raises:
        AdapeftError: ``max_length`` leaves nothing of a text, or a row has no token.
    """
    is_pair = len(columns) == 2
    num_special = tokenizer.num_special_tokens_to_add(is_pair)
    # Beneath that tokenizers cut texts to nothing, or do not cut them at all.
    if max_length < (shortest := num_special + 1 + is_pair):
        raise AdapeftError(
            f"data.max_length = {max_length}: {num_special} special tokens stand around the text{'s' * is_pair} "
            f"of an example, so that nothing of {'both' if is_pair else 'it'} is left. Raise it to {shortest} at least."
        )

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        return dict(tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length))

    encoded = _map(rows, encode)
    lengths = pc.list_value_length(encoded.data.column("input_ids")).to_numpy()
    if not lengths.all():
        # Only tokenizers without special tokens, as GPT-2's, make nothing out of an empty text.
        raise AdapeftError(
            f"data.text = {columns[0]!r}: row {int(lengths.argmin())} (counted from 0) has not one token "
            f"({int((lengths == 0).sum())} of {len(lengths)}). Drop such rows."
        )
    return encoded


def blocks_of(
    rows: datasets.Dataset, column: str, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """Blocks of exactly ``max_length`` tokens.

    Texts are tokenized without special tokens, joined, cut into blocks, and the rest is dropped. The end-of-text token
    follows each text, except for the rows of a .txt file: they are lines of one text, so nothing comes between them.

    Args:
        rows: with the texts.
        column: that holds them.
        max_length: of a block, in tokens.
        tokenizer: of the model.

    Raises:
        AdapeftError: a block of that length predicts nothing, or the texts have too few tokens for one.
    """
    if max_length < 2:
        raise AdapeftError(
            f"data.max_length = {max_length}: the first token of a block predicts nothing, so blocks of that "
            "length have no loss. Raise it to 2 at least."
        )
    is_one_text = rows.builder_name == "text"
    end = [] if is_one_text or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        # verbose: a text longer than the model's context is no mistake, it is cut into blocks below.
        texts = tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [tokens + end for tokens in texts if tokens]}

    tokens = pc.list_flatten(_map(rows, encode).data.column("input_ids")).to_numpy()
    num_blocks = len(tokens) // max_length
    if num_blocks == 0:
        raise AdapeftError(
            f"data.max_length = {max_length}: the texts have only {len(tokens)} tokens, not one block of that "
            "length. Lower data.max_length or give more text."
        )
    blocks = tokens[: num_blocks * max_length].reshape(num_blocks, max_length)
    return datasets.Dataset.from_dict({"input_ids": blocks})
