"""Tiny models and batches from a seed, for tests in this process and on ranks started by them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

VOCABULARY = 29


def make_bert() -> BertForSequenceClassification:
    """Two layers, a new head of three classes, sizes that no world size divides; dropout on, as real models have it."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=19,
            max_position_embeddings=16,
            num_labels=3,
        )
    )
    # As after from_pretrained on a checkpoint of the base model: the head is new.
    model.config.architectures = ["BertModel"]
    return _at_work(model)


def make_gpt2() -> GPT2LMHeadModel:
    """Two layers of Conv1D, embeddings tied to the language model's head."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=3))
    model.config.architectures = ["GPT2LMHeadModel"]
    return _at_work(model)


def make_batches(model: PreTrainedModel, num_batches: int = 6, size: int = 5) -> list[dict[str, Tensor]]:
    """Batches as a DataLoader yields them: padded inputs and labels, the last one short."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(num_batches):
        rows = size if index < num_batches - 1 else size - 2
        ids = torch.randint(1, VOCABULARY, (rows, 9), generator=generator)
        lengths = torch.randint(4, 10, (rows, 1), generator=generator)
        mask = (torch.arange(9) < lengths).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        if hasattr(model, "lm_head"):
            batch["labels"] = torch.where(mask.bool(), ids, -100)
        else:
            batch["labels"] = torch.randint(0, 3, (rows,), generator=generator)
        batches.append(batch)
    return batches


def _at_work(model: PreTrainedModel) -> PreTrainedModel:
    """Weights of working size: at transformers' initial 0.02 a tiny model's output hardly depends on them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
