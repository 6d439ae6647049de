"""Small language models trained from scratch for minutes, on the first half of WikiText-2's training text."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler, set_seed

TEXT = Path("../shared/data/wikitext2/train.txt")
HELD_OUT = Path("../shared/data/wikitext2/validation.txt")
VOCABULARY, LENGTH, BATCH = 4096, 128, 16


def train_language_model(folder: Path, num_steps: int, *, layers: int = 4, width: int = 192) -> None:
    """Train and save a Llama and its byte-pair tokenizer, which is the same for every size.

    Heads have a width of 32, and there are half as many key-value heads.
    """
    text = TEXT.read_text()
    half = text[: len(text) // 2]
    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(half.splitlines(), vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    tokens = tokens_of(tokenizer, half)
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    set_seed(0)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=50, num_training_steps=num_steps)
    started = time.perf_counter()
    for step in range(num_steps):
        batch = blocks[torch.randint(len(blocks), (BATCH,))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"base: step {step + 1}/{num_steps}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s")
    model.save_pretrained(folder)


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return the token ids of a text, shape (tokens,)."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def unigram_perplexity(folder: Path) -> float:
    """Return the held-out perplexity of token frequencies in the training text of ``folder``'s model, plus one each."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = TEXT.read_text()
    counts = torch.bincount(tokens_of(tokenizer, text[: len(text) // 2]), minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[tokens_of(tokenizer, HELD_OUT.read_text())].mean())
