"""Run under torchrun: the library under FSDP2, FullyShardedDataParallel and DistributedDataParallel.

``torchrun --nproc-per-node 2 -m tests.on_ranks.library OUT`` writes the deltas of the first rank and the
errors of each rank.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import adapeft
from adapeft import AdapeftError
from adapeft.parts.rows import Rows
from tests.oracles.leaves import make_subset
from tests.oracles.parts import MODELS, mixed_subset
from tests.support.ranks import leave
from tests.support.tiny import make_batches

KINDS = ("tensor", "row", "element", "lora")
NUM_STEPS = 3


def subset_of(model: nn.Module, kind: str) -> adapeft.Subset:
    return mixed_subset(model) if kind == "lora" else make_subset(model, kind)


def train_on(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    ranks: range,
    world_size: int,
    reference: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> None:
    """Train by SGD on the mean loss of ``ranks``' shares of each batch; its steps differ as little as the gradients.

    Args:
        reference: called with each share between the forward and the backward pass, as in DPO.
    """
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for batch in batches:
        for rank in ranks:
            mine = {name: value[rank::world_size] for name, value in batch.items()}
            loss = model(**mine).loss / len(ranks)
            if reference is not None:
                reference(mine)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def batches_of(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return make_batches(model, num_batches=NUM_STEPS + 1, size=4)[:NUM_STEPS]


def fsdp2(model: nn.Module) -> nn.Module:
    for layer in blocks(model):
        fully_shard(layer)
    return fully_shard(model)


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def blocks(model: nn.Module) -> nn.ModuleList:
    return model.bert.encoder.layer if hasattr(model, "bert") else model.transformer.h


WRAPPERS = {"fsdp2": fsdp2, "fsdp1": fsdp1, "ddp": DistributedDataParallel}


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except AdapeftError as error:
        return str(error)
    return ""


def based(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of the model without its delta."""
    with adapeft.base(model):
        return model(**batch).logits


def note_base(messages: list[str], model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Run the model without its delta and append the refusal, empty if there is none."""
    messages.append(refusal(partial(based, model, batch)))


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    refused = {}
    for wrapper, wrap in WRAPPERS.items():
        for name in ("bert", "gpt2"):
            for kind in KINDS:
                model = MODELS[name]().eval()
                adapeft.attach(model, subset_of(model, kind))
                batches = batches_of(model)
                wrapped = wrap(model)
                messages: list[str] = []
                reference = partial(note_base, messages, wrapped)
                train_on(wrapped, batches, range(rank, rank + 1), world_size, reference)
                refused[f"base {wrapper} {name} {kind}"] = messages[0]
                if not messages[0]:
                    with torch.no_grad():
                        before = wrapped(**batches[0]).logits
                        found = before, based(wrapped, batches[0]), wrapped(**batches[0]).logits
                    torch.save(found, out / f"based-{wrapper}-{name}-{kind}-{rank}.pt")
                adapeft.delta(wrapped).save(out / f"{wrapper}-{name}-{kind}-{rank}.safetensors")
        model = MODELS["bert"]().eval()
        wrapped = wrap(model)
        refused[f"attach {wrapper}"] = refusal(
            lambda w=wrapped: adapeft.attach(w, make_subset(MODELS["bert"](), "row"))
        )
        if wrapper != "ddp":
            refused[f"select {wrapper}"] = refusal(lambda w=wrapped: adapeft.select(w, make_batches(MODELS["bert"]())))
            refused[f"Delta.apply {wrapper}"] = refusal(lambda w=wrapped: adapeft.Delta({}, {}, "f").apply(w))
    refused["attach another subset"] = disagreement(rank)
    torch.save(refused, out / f"refused-{rank}.pt")


def disagreement(rank: int) -> str:
    """Attach another row on every rank, as after choosing on each, and return the refusal."""
    model = MODELS["bert"]()
    name, weight = next((name, weight) for name, weight in model.named_parameters() if name.endswith("query.weight"))
    rows = Rows(tuple(weight.shape), torch.tensor([rank]))
    found = refusal(partial(adapeft.attach, model, adapeft.Subset({name: rows})))
    dist.barrier()
    adapeft.attach(MODELS["bert"](), adapeft.Subset({name: rows}), alone=True)
    adapeft.attach(MODELS["bert"](), adapeft.Subset({name: Rows(rows.shape, torch.tensor([5]))}))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
    leave()
