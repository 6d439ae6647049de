"""Tokenization of texts and collation of batches; all inputs of a model are made here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.arrow_writer import ArrowWriter
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapeft.data.cache import Cache, Progress
from adapeft.data.content import rows_hash
from adapeft.data.description import Batch, DataDescription
from adapeft.data.streams import Rows, RowStream
from adapeft.errors import AdapeftError
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.tokens.packing import packed_batch, rows_of
from adapeft.tasks.tokens.tokenizer_state import tokenizer_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Draw = Callable[[dict[str, list[Any]], Sequence[int], int], dict[str, list[Any]]]
"""Columns of some examples, their ids and the epoch → columns, which depend on nothing else."""


@dataclass(frozen=True)
class TokenizedData:
    """The tokenized examples of a split.

    Attributes:
        rows: inputs of the model, not padded; mapped to memory if they come from the cache. A column ``labels`` holds
            labels of tokens, a column ``is_truncated`` whether tokens of the example were cut off.
        labels: labels of the N examples in the format of ``Batch``, [N, …]; None if they are a column of ``rows``, or
            the inputs themselves.
        tokenizer: tokenizer that can pad.
        fixed_length: number of tokens of every batch; None: that of its longest example.
        target_length: maximum number of labels of an example, where they are those of another text than the inputs,
            which a batch pads to the longest of its own; None where they are not.
        num_choices: number of texts of every example, whose columns hold a list for each; None: one text.
        draw: what draws a part of the examples anew in every epoch, such as masks; None: they are the same in each.
        packed_length: maximum number of tokens of a row that examples share; None: one example per row.
        numbers: numbers of the examples in the data set, if they are not their places in ``rows``: int64 [N].
    """

    rows: datasets.Dataset
    labels: Tensor | None
    tokenizer: PreTrainedTokenizerBase
    fixed_length: int | None = None
    target_length: int | None = None
    num_choices: int | None = None
    draw: Draw | None = None
    packed_length: int | None = None
    numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_pair(self) -> bool:
        """Whether the labels are those of another text than the inputs."""
        return self.target_length is not None

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example; of several texts, that of the longest."""
        if self.num_choices is not None:
            lengths = pc.list_value_length(pc.list_flatten(self._column("input_ids"))).to_numpy()
            return lengths.reshape(-1, self.num_choices).max(1).tolist()
        lengths = pc.list_value_length(self._column("input_ids"))
        if self.is_pair:
            lengths = pc.max_element_wise(lengths, pc.list_value_length(self._column(LABELS)))
        return lengths.to_pylist()

    @property
    def num_truncated(self) -> int:
        """Number of examples of which tokens were cut off."""
        return pc.sum(self._column(TRUNCATED)).as_py() if TRUNCATED in self.rows.column_names else 0

    def select(self, indices: np.ndarray) -> Self:
        """Return the examples at ``indices``, in that order."""
        labels = None if self.labels is None else self.labels[torch.from_numpy(indices)]
        return replace(self, rows=self.rows.select(indices), labels=labels)

    def collate(self, indices: Sequence[int] | np.ndarray, epoch: int = 0) -> Batch:
        """Return the examples at ``indices`` (at least one), padded on the tokenizer's padding side, or packed.

        Args:
            indices: places of the examples in ``rows``.
            epoch: number of the training epoch, on which only what is drawn depends.
        """
        places = [int(index) for index in indices]
        assert places, "a batch has at least one example"
        ids = torch.tensor(places) if self.numbers is None else torch.from_numpy(self.numbers[places])
        columns = self.rows[places]
        columns.pop(TRUNCATED, None)
        if self.draw is not None:
            columns = self.draw(columns, ids.tolist(), epoch)
        token_labels = columns.pop(LABELS, None)
        if self.packed_length is not None:
            assert token_labels is not None
            assert self.tokenizer.pad_token_id is not None
            tokens = columns["input_ids"]
            rows = rows_of([len(one) for one in tokens], self.packed_length)
            return packed_batch(tokens, token_labels, ids, rows, self.tokenizer.pad_token_id)
        if self.num_choices is not None:
            columns = {name: [text for texts in values for text in texts] for name, values in columns.items()}
        padding = "longest" if self.fixed_length is None else "max_length"
        inputs = dict(
            self.tokenizer.pad(columns, padding, self.fixed_length, return_attention_mask=True, return_tensors="pt")
        )
        if self.num_choices is not None:
            inputs = {name: value.view(len(ids), self.num_choices, -1) for name, value in inputs.items()}
        if self.labels is not None:
            return Batch(inputs, self.labels[places], ids)
        if token_labels is not None:
            length = max(map(len, token_labels)) if self.is_pair else inputs["attention_mask"].shape[1]
            return Batch(inputs, self._padded(token_labels, length), ids)
        return Batch(inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED), ids)

    def _column(self, name: str) -> pa.ChunkedArray:
        return self.rows.with_format("arrow")[name][:]

    def _padded(self, labels: list[list[int]], length: int) -> Tensor:
        """Return labels of tokens int64 [n, length], -100 after the last, or where the inputs are padded."""
        is_left = self.tokenizer.padding_side == "left" and not self.is_pair
        fill = [[IGNORED] * (length - len(own)) for own in labels]
        return torch.tensor([more + own if is_left else own + more for own, more in zip(labels, fill, strict=True)])


LABELS, TRUNCATED = "labels", "is_truncated"
"""Columns of tokenized examples that are no inputs of the model."""
NUMBER, READ, MADE = "number", "num_read", "num_made"
"""Columns of the examples of a stream: their number, and the rows read and examples made when they were made."""


def check_fast(tokenizer: PreTrainedTokenizerBase, needed: str) -> None:
    """Check that a tokenizer tells where its tokens come from; ``needed`` completes "does not tell …" in the error."""
    if not tokenizer.is_fast:
        raise AdapeftError(
            f"model.name: its tokenizer, {type(tokenizer).__name__}, does not tell {needed}. Use a model with a "
            "tokenizer.json."
        )


def examples_of(
    rows: datasets.Dataset,
    columns: Sequence[str],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache | None = None,
) -> datasets.Dataset:
    """Tokenize one example per row: a text or a pair of texts with special tokens, truncated to ``max_length``.

    Args:
        rows: rows with the texts.
        columns: one or two columns of texts, the first that of ``data.text``.
        max_length: maximum number of tokens.
        tokenizer: tokenizer that can pad.
        cache: cache of this machine; None: in memory.

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

    def encoded(progress: Progress) -> Iterator[dict[str, Any]]:
        num_empty, first_empty, start = 0, 0, 0
        for batch in map(encode, batches_of(rows, columns, progress)):
            empty = [row for row, tokens in enumerate(batch["input_ids"], start) if not tokens]
            if empty and not num_empty:
                first_empty = empty[0]
            num_empty, start = num_empty + len(empty), start + len(batch["input_ids"])
            yield batch
        if num_empty:
            # Only tokenizers without special tokens, such as GPT-2's, return no tokens for an empty text.
            raise AdapeftError(
                f"data.text = {columns[0]!r}: row {first_empty} (counted from 0) has no tokens "
                f"({num_empty} of {len(rows)} rows have none). Drop such rows."
            )

    return made(encoded, {"kind": "examples", "max_length": max_length}, rows, columns, tokenizer, cache)


def blocks_of(
    rows: Rows,
    column: str,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache | None = None,
    *,
    is_framed: bool = False,
) -> datasets.Dataset:
    """Return blocks of exactly ``max_length`` tokens.

    Texts are tokenized without special tokens, joined and split into blocks; the remainder is dropped. The
    end-of-text token follows each text, except in .txt files, whose rows are lines of one text. In framed blocks it is
    the separator.

    Args:
        rows: rows with the texts.
        column: column of the texts.
        max_length: number of tokens per block.
        tokenizer: tokenizer of the model.
        cache: cache of this machine; None: in memory.
        is_framed: whether each block has the special tokens around it that the tokenizer puts around a text, as
            encoders read them.

    Raises:
        AdapeftError: a block of that length has no predictions, or the texts have too few tokens for one block.
    """
    before, after = _frame(tokenizer) if is_framed else ([], [])
    room = max_length - len(before) - len(after)
    if is_framed and room < 1:
        raise AdapeftError(
            f"data.max_length = {max_length}: a block has {max_length - room} special tokens around its text, so no "
            f"token of it is left. Raise it to at least {max_length - room + 1}."
        )
    if not is_framed and max_length < 2:
        raise AdapeftError(
            f"data.max_length = {max_length}: the first token of a block is not predicted, so blocks of this length "
            "have no loss. Raise it to at least 2."
        )
    is_one_text = rows.builder_name == "text"
    last = tokenizer.sep_token_id if is_framed else tokenizer.eos_token_id
    end = [] if is_one_text or last is None else [last]

    def blocks(progress: Progress) -> Iterator[dict[str, Any]]:
        rest, is_long_enough = np.empty(0, np.int32), False
        for batch in batches_of(rows, [column], progress):
            # No warning: a text may be longer than the model's context, it is split into blocks below.
            texts = tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]
            tokens = [token for text in texts if text for token in text + end]
            rest = np.concatenate([rest, np.array(tokens, np.int32)])
            num_blocks = len(rest) // room
            if num_blocks:
                is_long_enough = True
                text = rest[: num_blocks * room].reshape(num_blocks, room)
                sides = [np.tile(np.array(side, np.int32), (num_blocks, 1)) for side in (before, after)]
                yield {"input_ids": np.hstack([sides[0], text, sides[1]])}
                rest = rest[num_blocks * room :]
        if not is_long_enough:
            raise AdapeftError(
                f"data.max_length = {max_length}: the texts have only {len(rest)} tokens, less than one block. Lower "
                "data.max_length or give more text."
            )

    key = {"kind": "framed blocks" if is_framed else "blocks", "max_length": max_length, "end": end}
    return made(blocks, key, rows, [column], tokenizer, cache)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    ids, is_special = found["input_ids"], found["special_tokens_mask"]
    start, stop = is_special.index(0), len(ids) - is_special[::-1].index(0)
    return ids[:start], ids[stop:]


def labels_of(
    rows: datasets.Dataset,
    columns: Sequence[str],
    description: DataDescription,
    make: Callable[[], Tensor],
    cache: Cache | None,
) -> Tensor:
    """Return the labels that ``make`` builds from the columns, mapped to memory if they come from the cache.

    Args:
        rows: rows with the labels.
        columns: columns of the labels.
        description: description of the training data, which numbers the classes.
        make: function that builds the labels; its result depends on nothing else.
        cache: cache of this machine; None: in memory.
    """
    if cache is None:
        return make()
    key = {
        "content": rows_hash(rows, columns),
        "columns": list(columns),
        "names": description.label_names,
        "outputs": description.num_labels,
        "problem": description.problem_type,
    }
    folder = cache.folder("labels", key, lambda to, progress: save_file({"labels": make()}, to / _LABELS))
    return load_file(folder / _LABELS)["labels"]


_ROWS, _LABELS = "rows.arrow", "labels.safetensors"
_BATCH = 1000
_HOPELESS = 100_000
"""Number of rows of a stream of which at least one has to be an example."""


def made(
    batches: Callable[[Progress], Iterable[dict[str, Any]]],
    key: Mapping[str, Any],
    rows: Rows,
    columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    cache: Cache | None,
) -> datasets.Dataset:
    """Return the examples in ``batches``, of which the cache holds those of the same rows, tokenizer and ``key``.

    Those of a stream are a ``datasets.IterableDataset``, which makes them whenever it is read.
    """
    if isinstance(rows, RowStream):
        return datasets.IterableDataset.from_generator(partial(_one_by_one, batches))
    if cache is None:
        sink = pa.BufferOutputStream()
        _write(batches(lambda done, total: None), ArrowWriter(stream=sink))
        return datasets.Dataset.from_buffer(sink.getvalue())
    whole = {**key, "content": rows_hash(rows, columns), "columns": len(columns)}
    if tokenizer is not None:
        whole["tokenizer"] = tokenizer_key(tokenizer)
    folder = cache.folder(
        "tokens", whole, lambda to, progress: _write(batches(progress), ArrowWriter(path=str(to / _ROWS)))
    )
    return datasets.Dataset.from_file(str(folder / _ROWS))


def _one_by_one(batches: Callable[[Progress], Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield the examples in ``batches``, with the columns of a stream.

    Raises:
        AdapeftError: as ``batches``, or none of many rows is an example.
    """
    made, read, waiting = 0, 0, dict[str, Any]()

    def progress(done: int, total: int) -> None:
        nonlocal read
        read = done
        if not made and not waiting and read >= _HOPELESS:
            raise AdapeftError(
                f"data.train: its first {read:,} rows are all dropped, by the rules of data.invalid, data.too_long and "
                "data.max_length. Change these, or correct the data."
            )

    # A batch waits for the next one, so that the counts of the last are those of all rows.
    for batch in itertools.chain(_named(batches(progress)), [dict[str, Any]()]):
        first, made = made, made + (len(next(iter(waiting.values()))) if waiting else 0)
        for number, values in enumerate(zip(*waiting.values(), strict=True), first):
            example = dict(zip(waiting, values, strict=True))
            # Numbers of 4 bytes, not views of the whole batch: lists of Python take several times as much.
            tokens = {name: np.array(value, np.int32) for name, value in example.items() if name != TRUNCATED}
            yield {**example, **tokens, NUMBER: number, READ: read, MADE: made}
        waiting = batch


def _named(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the batches; errors name the split."""
    try:
        yield from batches
    except AdapeftError as error:
        if "data.train" in str(error):
            raise
        raise AdapeftError(f"data.train: {error}") from error


def _write(batches: Iterable[dict[str, Any]], writer: ArrowWriter) -> None:
    with writer:
        for batch in batches:
            writer.write_batch(batch)
        writer.finalize()


def batches_of(rows: Rows, columns: Sequence[str], progress: Progress) -> Iterator[dict[str, list[str]]]:
    """Yield the texts of the columns, and report the rows that are done, of how many unless the rows are a stream."""
    done, total = 0, 0 if isinstance(rows, RowStream) else len(rows)
    for batch in rows.select_columns(list(columns)).iter(_BATCH):
        yield batch
        done += len(batch[columns[0]])
        progress(done, total)
