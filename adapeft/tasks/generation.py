"""Answers that a language model generates for prompts: greedily, with the cache of keys and values."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from adapeft.tasks.losses.own_loss import are_alike
from adapeft.tasks.losses.split import unwrapped

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """Prompts of evaluation examples, and the answers that the data give.

    Attributes:
        ids: tokens of each prompt; of an encoder-decoder, those that the encoder reads.
        texts: the prompts as texts.
        references: the answers of the data, as ``tokenizer`` decodes their tokens.
        examples: the examples' numbers in the evaluation data.
        ends: tokens that end an answer, besides those of the model's generation config.
        max_new_tokens: maximum number of tokens of an answer.
        tokenizer: tokenizer that can pad.
    """

    ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    references: Sequence[str]
    examples: Sequence[int]
    ends: frozenset[int]
    max_new_tokens: int
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Iterable[int], padding_side: str) -> BatchEncoding:
        """Return some prompts as a batch."""
        ids = [list(self.ids[index]) for index in indices]
        return self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")


@dataclass(frozen=True)
class Generation:
    """A generated answer.

    Attributes:
        example: number of the example in the evaluation data, counted from 0.
        prompt: text that the model read.
        reference: answer of the data.
        answer: answer of the model.
    """

    example: int
    prompt: str
    reference: str
    answer: str


@torch.no_grad()
def answer(model: nn.Module, prompts: Prompts, indices: Sequence[int], *, in_step: bool) -> list[str]:
    """Return the model's answers to some prompts, without the tokens that end them and blanks around them.

    Args:
        model: model, or an engine around it, in evaluation mode.
        prompts: all prompts.
        indices: prompts to answer, at least one.
        in_step: whether every rank generates until all are done, because a forward pass is a collective.
    """
    inner: Any = unwrapped(model)
    batch, config = prompts.batch(indices, _side(inner)).to(inner.device), _config(inner, prompts)
    rows: Tensor = inner.generate(**batch, generation_config=config, synced_gpus=in_step)
    # The decoder of an encoder-decoder begins with a token that may be one that ends an answer.
    start = 1 if inner.config.is_encoder_decoder else batch["input_ids"].shape[1]
    ends = set(config.eos_token_id)
    return [_text(prompts.tokenizer, row, ends) for row in rows[:, start:].tolist()]


@torch.no_grad()
def is_independent_of_padding(model: nn.Module, prompts: Prompts, *, in_step: bool) -> bool:
    """Return whether padding the shortest prompt to the longest does not change its first two predictions.

    It changes those of state-space models, which process padding. Collective under ZeRO-3.
    """
    inner: Any = unwrapped(model)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts.ids[index]))
    shortest, longest = order[0], order[-1]
    if len(prompts.ids[shortest]) == len(prompts.ids[longest]):
        return True
    config = _config(inner, prompts)
    config.update(max_new_tokens=2, min_new_tokens=2, output_logits=True, return_dict_in_generate=True)

    def logits_of(*indices: int) -> Tensor:
        batch = prompts.batch(indices, _side(inner)).to(inner.device)
        steps = inner.generate(**batch, generation_config=config, synced_gpus=in_step).logits
        # generate returns float32, whatever the model computes in: differences of its rounding are none of padding.
        return torch.stack([step[0] for step in steps]).to(inner.dtype)

    return are_alike(logits_of(shortest), logits_of(shortest, longest))


def _side(model: Any) -> str:
    """Return the side of the padding: an answer follows the last token of its prompt, unless a decoder begins it."""
    return "right" if model.config.is_encoder_decoder else "left"


def _config(model: Any, prompts: Prompts) -> GenerationConfig:
    """Return the model's own generation config, for greedy answers that end where those of the data do."""
    config = copy.deepcopy(model.generation_config)
    own = config.eos_token_id
    ends = {*prompts.ends, *(own if isinstance(own, list) else [] if own is None else [own])}
    config.update(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_length=None,
        max_new_tokens=prompts.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=prompts.tokenizer.pad_token_id,
    )
    return config


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> str:
    """Return the text before the first token that ends an answer."""
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(ids[:length], skip_special_tokens=True)).strip()
