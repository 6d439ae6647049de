"""Failures of a batch that its input causes raise an error that names the examples; others pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import adapeft
from adapeft.data.description import Batch
from adapeft.data.refused_batch import naming_examples
from adapeft.errors import AdapeftError
from adapeft.ranks import OneRank
from adapeft.tasks.losses.cross_entropy import Classification
from adapeft.tasks.losses.micro_batches import micro_losses
from tests.support.tiny import VOCABULARY, make_batches, make_bert

BATCH = Batch({"input_ids": torch.zeros(10, 4, dtype=torch.int64)}, torch.zeros(10), torch.arange(100, 110))


def batch_of(ids, labels):
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, torch.arange(7, 7 + len(ids)))


@pytest.mark.parametrize(
    ("ids", "label", "said"),
    [
        (torch.full((2, 4), VOCABULARY), 0, "IndexError: index out of range in self"),
        (torch.zeros(2, 17, dtype=torch.int64), 0, "RuntimeError: "),
        (torch.zeros(2, 4, dtype=torch.int64), 3, "IndexError: Target 3 is out of bounds"),
    ],
)
def test_the_models_own_failures_name_the_examples(ids, label, said):
    batch = batch_of(ids, torch.tensor([0, label]))
    losses, _ = micro_losses(np.arange(2), lambda indices: batch, Classification(), OneRank(), 1, torch.device("cpu"))
    with pytest.raises(AdapeftError, match="cannot take a batch of examples 7, 8 ") as caught:
        losses[0](make_bert())
    assert said in str(caught.value)
    assert f"input_ids {list(ids.shape)}" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:9"),
        RuntimeError("NCCL error: remote process exited or there was a network error"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        KeyError("x"),
    ],
)
def test_failures_of_machines_pass(error):
    with pytest.raises(type(error)) as caught, naming_examples(BATCH):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        IndexError("index out of range in self"),
        RuntimeError("index 34 is out of bounds for dimension 1 with size 34"),
        RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous"),
        RuntimeError("The size of tensor a (35) must match the size of tensor b (34) at non-singleton dimension 1"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 5x6)"),
        RuntimeError("shape '[2, -1, 16]' is invalid for input of size 48"),
    ],
)
def test_failures_of_inputs_name_the_examples(error):
    said = r"examples 100, 101, .*, 107, … \(counted from 0; input_ids \[10, 4\]"
    with pytest.raises(AdapeftError, match=said), naming_examples(BATCH):
        raise error


def test_the_library_names_them_too():
    model = make_bert()
    batches = make_batches(model)
    batches[3]["input_ids"][1, 0] = VOCABULARY
    with pytest.raises(AdapeftError, match=r"cannot take a batch of examples 15, 16, 17, 18, 19 .*IndexError"):
        adapeft.select(model, batches, budget=100)
