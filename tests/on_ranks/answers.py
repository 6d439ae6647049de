"""Run under torchrun: generates answers at every ZeRO stage, with engines for training and for inference.

``torchrun --nproc-per-node 2 -m tests.on_ranks.answers OUT`` writes ``answers-RANK.json``: engine → answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from adapeft.tune.attach import attach
from tests.support.questions import make_llama, make_prompts
from tests.support.ranks import leave

NAME = "model.layers.0.mlp.down_proj.weight"


def main(out: Path) -> None:
    from cluster.ranks.answers import generate
    from cluster.zero import engine as engines

    ranks = engines.join()
    prompts, found = make_prompts(), {}
    for stage in range(4):
        model = make_llama()
        if stage:
            attach(model, Subset({NAME: Rows((24, 28), torch.tensor([3, 5]))}))
            model = engines.training_engine(
                model,
                zero_stage=stage,
                num_micro=1,
                learning_rate=0.1,
                weight_decay=0.0,
                max_grad_norm=None,
                schedule=lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
                persistence_threshold=0,
            )
        found[f"training-{stage}"] = model
    # At the usual threshold stage 3 would keep a tiny model whole on every rank.
    with patch("cluster.zero.engine.PERSISTENCE_THRESHOLD", 0):
        found["inference-3"] = engines.inference_engine(make_llama(), 3)
    for name, model in found.items():
        model.eval()
        is_whole = all(parameter.numel() for parameter in getattr(model, "module", model).parameters())
        assert is_whole != name.endswith("3"), "only stage 3 divides the weights"
        generations = generate(model, prompts, 2, ranks, lambda event: None)
        found[name] = [vars(one) for one in generations]
    (out / f"answers-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
