"""Rank functions: measure, finetune, evaluate, validate. Imports no Ray."""

import os

import torch

if not torch.cuda.is_available():
    # DeepSpeed selects its accelerator on import, and without this prints a warning to standard output.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
