"""A trial run of examples through the model's structure, to find bad inputs before a worker loads weights and crashes.

The model's own code computes positions, token types and masks, and looks them up in tables of their real sizes. So
position offsets, model-specific names of the maximum length, and models without a limit need no special cases here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import datasets
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapeft.errors import AdapeftError
from adapeft.model.unloaded.weightless import BeyondTableError, UnknownValueError, Weightless
from adapeft.tasks.losses.split import with_decoder_inputs
from adapeft.tasks.tokens.tokenize import LABELS, TokenizedData

Row = Mapping[str, list[int]]

_SHORT = 4
MOST_OPERATIONS = 50_000
"""Limit of operations per pass, reached within seconds. A model of 80 layers needs about 5,000; models that loop over
tokens, such as Zamba, need 100 per token."""


class Trial:
    """Checks of a model without weights on examples of the data.

    Args:
        model: model on the meta device, built while ``weightless`` was active.
        weightless: the mode that holds the values of the model's buffers.
        sample: some examples, including the longest.
        most_operations: number of operations after which a pass is abandoned.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weightless: Weightless,
        sample: TokenizedData,
        most_operations: int = MOST_OPERATIONS,
    ) -> None:
        self._model, self._weightless, self._tokenizer = model, weightless, sample.tokenizer
        self._target_length, self._is_pair = sample.target_length, sample.is_pair
        weightless.most_operations = most_operations
        weightless.forget(list(model.parameters()))
        lengths = sample.lengths
        self._has_choices = sample.num_choices is not None
        self._longest, self._shortest = (
            _text_of(sample, lengths.index(length)) for length in (max(lengths), min(lengths))
        )

    def check(self, max_length: int, largest_used: Callable[[], tuple[str, int]]) -> None:
        """Check lengths, token types and token ids.

        Args:
            max_length: ``data.max_length``, to which examples are truncated.
            largest_used: function that returns the config key of a split and the largest token id in the data, which
                that split holds; called only if the tokenizer has more tokens than the model.

        Raises:
            AdapeftError: the model cannot process these examples.
        """
        failure = self._run(self._longest, self._shortest)
        if failure is not None:
            self._explain(failure, max_length)
        elif len(self._longest["input_ids"]) < max_length:
            self._check_length(max_length)
        if self._target_length is not None:
            self._check_target("max_target_length", self._target_length)
        self._check_largest(largest_used)

    def check_answers(self, longest_prompt: int, max_new_tokens: int) -> None:
        """Check that the model accepts the longest prompt with its answer, or its decoder the answer.

        Raises:
            AdapeftError: it has fewer positions.
        """
        if self._is_pair:
            return self._check_target("max_new_tokens", max_new_tokens)
        positions = self._too_few(longest_prompt + max_new_tokens)
        if positions is not None:
            raise AdapeftError(
                f"data.max_new_tokens = {max_new_tokens}: with the longest prompt, of {longest_prompt} tokens, an "
                f"answer may need {longest_prompt + max_new_tokens} positions, but the model has {positions}. Lower "
                "data.max_new_tokens, or data.max_length to leave out longer prompts."
            )

    def _explain(self, failure: Exception, max_length: int) -> None:
        """Raise an error that explains why the model fails on the examples."""
        if isinstance(failure, BeyondTableError):
            if not _same(failure, self._run(self._longest, self._shortest, token_type_ids=lambda types: types * 0)):
                raise AdapeftError(
                    f"data.train: the tokenizer of model.name gives token type {failure.index} (for data.text_pair), "
                    f"but the model has {failure.size}{self._named(failure)}. Leave out data.text_pair, or use the "
                    "tokenizer that belongs to the model."
                ) from failure
            last = failure.size - 1
            if not _same(failure, self._run(self._longest, self._shortest, input_ids=lambda ids: ids.clamp(max=last))):
                raise AdapeftError(self._beyond("data.train", failure.index, failure)) from failure
        self._check_length(max_length)
        if isinstance(failure, ValueError):
            raise AdapeftError(
                f"model.name: the model rejects these examples: {str(failure).strip().splitlines()[0]}"
            ) from failure

    def _check_length(self, max_length: int) -> None:
        """Check that the model accepts an example of ``data.max_length`` tokens if it accepts a short one."""
        positions = self._too_few(max_length)
        if positions is not None:
            raise AdapeftError(
                f"data.max_length = {max_length}: the model has {positions} positions. Lower it to that or less."
            )

    def _check_target(self, key: str, length: int) -> None:
        """Check that the decoder accepts a target of ``length`` tokens if it accepts a short one."""
        token = self._longest[LABELS][0]
        positions = self._too_few(length, lambda count: {**self._at_length(_SHORT), LABELS: [token] * count})
        if positions is not None:
            raise AdapeftError(
                f"data.{key} = {length}: the decoder has {positions} positions. Lower it to that or less."
            )

    def _too_few(self, length: int, row_at: Callable[[int], Row] | None = None) -> int | None:
        """Return the model's number of positions if it rejects ``length`` tokens and accepts fewer, otherwise None."""
        row_at = row_at or self._at_length
        failure = self._run(row_at(length))
        if failure is None:
            return None
        if not _is_certain(failure):
            positions = _positions_by_table(self._model)
            return positions if positions is not None and length > positions else None
        if _is_certain(self._run(row_at(_SHORT))):
            return None  # the length is not the cause, and possibly not the examples either
        positions, fails = _SHORT, length
        while fails - positions > 1:
            middle = (positions + fails) // 2
            is_too_long = _is_certain(self._run(row_at(middle)))
            positions, fails = (positions, middle) if is_too_long else (middle, fails)
        return positions

    def _check_largest(self, largest_used: Callable[[], tuple[str, int]]) -> None:
        """Check the tokenizer's largest token id, and if the model lacks it, the largest one in the data."""
        largest = max(self._tokenizer.get_vocab().values())
        row = self._at_length(min(len(self._shortest["input_ids"]), _SHORT))
        ids = list(row["input_ids"])
        ids[len(ids) // 2] = largest
        failure = self._run({**row, "input_ids": ids})
        if not isinstance(failure, BeyondTableError):
            return
        field, used = largest_used()
        if used >= failure.size:
            raise AdapeftError(self._beyond(field, used, failure)) from failure

    def _beyond(self, field: str, token: int, failure: BeyondTableError) -> str:
        pad = ", its padding token," if token == self._tokenizer.pad_token_id else ""
        return (
            f"{field}: the tokenizer of model.name maps {self._tokenizer.convert_ids_to_tokens(token)!r}{pad} to id "
            f"{token}, but the model has {failure.size} embeddings{self._named(failure)}. Use the tokenizer that "
            f"belongs to the model, or resize the embeddings (model.resize_token_embeddings"
            f"({len(self._tokenizer)})) and save the model."
        )

    def _named(self, failure: BeyondTableError) -> str:
        tensors = [*self._model.named_parameters(), *self._model.named_buffers()]
        storage = failure.table.untyped_storage()
        names = [name for name, tensor in tensors if tensor.untyped_storage() is storage]
        return f" ({names[0]})" if names else ""

    def _at_length(self, length: int) -> Row:
        """Return the longest example at ``length`` tokens, with ordinary tokens repeated or left out.

        The target of a pair stays as it is.
        """
        longest = {name: values for name, values in self._longest.items() if not (self._is_pair and name == LABELS)}
        target = {LABELS: self._longest[LABELS]} if self._is_pair else {}
        ids = longest["input_ids"]
        special = set(self._tokenizer.all_special_ids)
        ordinary = next((place for place, token in enumerate(ids) if token not in special), 0)
        more = length - len(ids)
        if more < 0:
            return target | {name: [*values[: length - 1], values[-1]] for name, values in longest.items()}
        return target | {
            name: [*values[:ordinary], *[values[ordinary]] * more, *values[ordinary:]]
            for name, values in longest.items()
        }

    def _run(self, *rows: Row, **changes: Callable[[Tensor], Tensor]) -> Exception | None:
        """Return the exception that the model raises for a batch of these examples, None if it succeeds."""
        data = datasets.Dataset.from_list(list(rows))
        examples = TokenizedData(data, None, self._tokenizer, None, self._target_length).collate(range(len(rows)))
        inputs = examples.inputs
        if self._has_choices:
            inputs = {name: tensor[:, None] for name, tensor in inputs.items()}
        if self._is_pair:
            inputs = with_decoder_inputs(self._model, inputs, examples.labels)
        tensors = {
            name: changes.get(name.removeprefix("decoder_"), _same_values)(tensor) for name, tensor in inputs.items()
        }
        given = {name: self._weightless.known(tensor) for name, tensor in tensors.items()}
        was_training = self._model.training
        try:
            with self._weightless, torch.no_grad():
                self._model.train()(**given)
        except Exception as error:  # the model's own code may raise anything; the caller interprets it
            return error
        finally:
            self._model.train(was_training)
        return None


def check_images(model: PreTrainedModel, weightless: Weightless, sample: TokenizedData) -> None:
    """Check that a model without weights accepts an image as its processor prepares it.

    Args:
        model: model on the meta device, built while ``weightless`` was active.
        weightless: the mode that holds the values of the model's buffers.
        sample: some examples.

    Raises:
        AdapeftError: the model rejects it, mostly because of its size.
    """
    weightless.forget(list(model.parameters()))
    inputs = sample.collate([0]).inputs
    try:
        with weightless, torch.no_grad():
            model(**{name: weightless.known(tensor) for name, tensor in inputs.items()})
    except Exception as error:  # the model's own code may raise anything
        if _is_certain(error):
            shape = list(inputs["pixel_values"].shape[1:])
            raise AdapeftError(
                f"model.name: the model rejects images of shape {shape}, as its preprocessor_config.json makes them: "
                f"{str(error).strip().splitlines()[0]} Use the image processor that belongs to the model."
            ) from error


def _text_of(sample: TokenizedData, index: int) -> Row:
    """Return the columns of numbers of an example, those of its longest text where it has several."""
    row = {name: values for name, values in sample.rows[index].items() if isinstance(values, list)}
    if sample.num_choices is None:
        return row
    longest = max(range(sample.num_choices), key=lambda choice: len(row["input_ids"][choice]))
    return {name: values[longest] for name, values in row.items()}


def _is_certain(failure: Exception | None) -> bool:
    """Whether the model would also raise the exception with weights."""
    if isinstance(failure, UnknownValueError | NotImplementedError):
        return False
    return isinstance(failure, IndexError | ValueError | RuntimeError)


def _same_values(tensor: Tensor) -> Tensor:
    return tensor


def _same(failure: BeyondTableError, other: Exception | None) -> bool:
    """Whether both exceptions report the same table as too small."""
    return isinstance(other, BeyondTableError) and other.table.untyped_storage() is failure.table.untyped_storage()


def _positions_by_table(model: PreTrainedModel) -> int | None:
    """Return the number of usable rows of a table of positions, without its offset; None if there is no such table."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2] and module.num_embeddings > 2:
            offset = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - int(offset)
    return None
