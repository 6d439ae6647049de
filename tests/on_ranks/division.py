"""Run under torchrun: loads, attaches, trains and evaluates a model that is divided from the start.

``torchrun --nproc-per-node 2 -m tests.on_ranks.division CONFIG key=value …`` writes what each rank held and found to
``rank-N.pt`` next to the config.
"""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapeft.config.load import load_config
from adapeft.deltas.extract import extract_delta
from adapeft.model.divided import full_value, shape_of
from adapeft.model.fingerprint import fingerprint_model
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tune.attach import attach
from tests.support.ranks import leave


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have created and that are still in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or storage.device.type == "meta":
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def mixed(model: nn.Module) -> Subset:
    """Return a subset of whole tensors in two layers, and of rows."""
    ends = ("self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.experts.down_proj")
    whole = {
        name: Whole(shape_of(parameter))
        for name, parameter in model.named_parameters()
        if name.startswith(("model.layers.0.", "model.layers.3.")) and name.endswith(ends)
    }
    rows = {"model.layers.1.self_attn.q_proj.weight": Rows((32, 32), torch.tensor([1, 5, 30]), 0)}
    return Subset({**whole, **rows}, (), ())


def main(path: Path, *overrides: str) -> None:
    from cluster.ranks.inputs import load_inputs
    from cluster.zero.division import division_of
    from cluster.zero.engine import inference_engine, join, training_engine

    ranks = join()
    config = load_config(path, overrides)
    inputs = load_inputs(config)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a dispatch mode sees only its own thread
    with Held() as held:
        model = inputs.model(division_of(config.cluster))
        loading = held.peak
    del held
    found: dict[str, Any] = {"loading": loading, "fingerprint": fingerprint_model(model)}
    found["values"] = {name: full_value(parameter).clone() for name, parameter in model.named_parameters()}
    found["buffers"] = dict(model.named_buffers())
    attach(model, mixed(model))
    engine = training_engine(
        model,
        zero_stage=3,
        num_micro=1,
        learning_rate=0.1,
        weight_decay=0.5,
        max_grad_norm=None,
        schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        persistence_threshold=0,
        offload=config.cluster.offload,
    )
    offloads = engine.zero_offload_param()
    found["offload"] = "none" if offloads is None else offloads.device
    found["trained in"] = {parameter.dtype for parameter in model.parameters()}
    batch = inputs.train.collate(range(4)).to(ranks.device)
    loss = inputs.objective.loss_sum(inputs.objective.forward(engine, batch), batch.labels)
    engine.backward(loss)
    engine.step()
    delta = extract_delta(model)
    found["delta"] = {name: change.values for name, change in delta.changes.items()}
    found["delta fingerprint"] = delta.fingerprint
    found["mapped"] = Path("/proc/self/maps").read_text().count(f"{config.cluster.offload_folder}/")
    engine.destroy()
    tuned = inputs.model(division_of(config.cluster))
    delta.add_to(tuned)
    found["tuned"] = {name: full_value(parameter).clone() for name, parameter in tuned.named_parameters()}
    # At the usual threshold stage 3 would keep a tiny model whole on every rank.
    with torch.no_grad():
        divided = inference_engine(tuned, 3, config.cluster.offload, persistence_threshold=0)
        found["logits"] = inputs.objective.forward(divided, batch)
        whole = inputs.model().to(ranks.device).eval()
        delta.apply(whole)
        found["logits of the whole model"] = inputs.objective.forward(whole, batch)
    torch.save(found, path.parent / f"rank-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave()
