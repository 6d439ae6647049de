"""What ranks import, before they are forked: DeepSpeed for CPUs among it."""

# ruff: noqa: F401
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import adapeft.subset.store
import cluster.ranks.finetune
import cluster.ranks.measure
