"""Prompts of different lengths and tiny models that answer them, for tests in this process and on ranks."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adapeft.tasks.generation import Prompts
from tests.support.chats import make_tokenizer

END = 70
"""A token of one letter, so that a text shows whether its answer has ended there."""
MOST = 9


def make_prompts(number: int = 5) -> Prompts:
    """Return prompts of 1 to ``number`` tokens, whose answers may also end with END."""
    tokenizer = make_tokenizer()
    texts = ["abcdefghij"[:length] for length in range(1, number + 1)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    examples = list(range(0, 2 * number, 2))
    return Prompts(ids, texts, ["?"] * number, examples, frozenset({END}), MOST, tokenizer)


def make_llama() -> LlamaForCausalLM:
    return _likely_to_end(
        LlamaForCausalLM,
        LlamaConfig(
            **_sizes(),
            hidden_size=24,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    )


def make_gpt2() -> GPT2LMHeadModel:
    return _likely_to_end(GPT2LMHeadModel, GPT2Config(**_sizes(), n_positions=24, n_embd=20, n_layer=2, n_head=2))


def answers_alone(model: PreTrainedModel, prompts: Prompts) -> list[str]:
    """Return what ``model.generate`` of transformers answers to each prompt alone, without padding."""
    said = []
    for ids in prompts.ids:
        own = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=MOST, eos_token_id=[2, END], pad_token_id=4
        )
        tokens = own[0, len(ids) :].tolist()
        ended = tokens[: tokens.index(END)] if END in tokens else tokens
        said.append(prompts.tokenizer.decode(ended, skip_special_tokens=True).strip())
    return said


def _sizes() -> dict[str, int]:
    tokenizer = make_tokenizer()
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": 2, "bos_token_id": 2}


def _likely_to_end(kind, config) -> PreTrainedModel:
    """Return a model with large random weights, of which some answers end early."""
    torch.manual_seed(3)
    config.initializer_range = 0.5
    model = kind(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[END] *= 4
    return model
