"""Run under torchrun: measures weights that another module reads at every ZeRO stage, and trains their leaves.

``torchrun --nproc-per-node 2 -m tests.on_ranks.reads OUT`` writes one file per stage.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapeft.deltas.extract import extract_delta
from adapeft.errors import AdapeftError
from adapeft.parts.elements import Elements
from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from adapeft.tune.attach import attach
from adapeft.tune.attachment import attachment_of
from tests.support.ranks import leave

RUNS = [(stage, checkpointing) for stage in (0, 1, 2, 3) for checkpointing in (False, True)]
NUM_STEPS, NUM_EXAMPLES = 4, 6
LEARNING_RATE = 0.05


class Mixer(nn.Module):
    """Reads the weights of layers that it does not call, one of them in another module."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.__dict__["table"] = table
        self.taps, self.projection = nn.Conv1d(6, 6, 3, groups=6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.einsum("bsi,ci->bsc", x, self.table.weight).softmax(-1) @ self.table.weight
        x = nn.functional.conv1d(x.transpose(1, 2), self.taps.weight, padding=1, groups=6).transpose(1, 2)
        return nn.functional.linear(x, self.projection.weight) + self.projection.bias


class Model(nn.Module):
    def __init__(self, checkpointing: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointing = checkpointing
        self.table, self.first, self.unused = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.mixer = Mixer(self.table)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if self.checkpointing:
            return checkpoint(self.mixer, x, use_reentrant=False)
        return self.mixer(x)


def subset(names: tuple[str, ...] = ("table.weight", "first.weight", "mixer.taps.weight", "mixer.projection.weight")):
    """Return a subset with rows of the first parameter and elements of the others."""
    shapes = {name: tuple(parameter.shape) for name, parameter in Model().named_parameters()}
    parts = {name: Elements(shapes[name], torch.arange(0, torch.Size(shapes[name]).numel(), 3)) for name in names}
    return Subset({**parts, names[0]: Rows(shapes[names[0]], torch.tensor([0, 2, 5]))})


def loss_of(model: nn.Module, step: int, examples: slice = slice(None)) -> Tensor:
    x = torch.randn(NUM_EXAMPLES, 5, 6, generator=torch.Generator().manual_seed(step))
    return model(x[examples]).sin().sum() / NUM_EXAMPLES


def train_plainly() -> dict[str, Tensor]:
    model = attach(Model(), subset())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(NUM_STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: change.values for name, change in extract_delta(model).changes.items()}


def main(out: Path) -> None:
    from torch.optim.lr_scheduler import LambdaLR

    from cluster.ranks.finetune import full_value
    from cluster.ranks.unreached import UnreachedCheck
    from cluster.zero.engine import inference_engine, join, training_engine
    from cluster.zero.shards import shards_of

    ranks = join()
    share = NUM_EXAMPLES // ranks.world_size
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)

    def engine_of(model: nn.Module, stage: int):
        return training_engine(
            model,
            zero_stage=stage,
            num_micro=1,
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            max_grad_norm=None,
            schedule=lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
            persistence_threshold=0,
        )

    for stage, checkpointing in RUNS:
        candidates = [name for name, _ in Model().named_parameters()]
        engine = inference_engine(Model(checkpointing), stage, persistence_threshold=0)
        shards = shards_of(engine, candidates, (), 1, ranks)
        gradients = []
        for step in range(2):
            with shards.gradients([lambda model, step=step: loss_of(model, step, mine)]) as found:
                gradients.append(float(ranks.all_reduce(sum(g.double().square().sum() for g in found).reshape(1))))
        reached = sorted(shards.reached)
        if stage == 3:
            engine.destroy()

        model = attach(Model(checkpointing), subset())
        engine = engine_of(model, stage)
        check = UnreachedCheck(attachment_of(model), ranks)
        for step in range(NUM_STEPS):
            engine.backward(loss_of(engine, step, mine) * ranks.world_size)
            engine.step()
            check.after_step(is_last_chance=True)
        values = {name: change.values for name, change in extract_delta(model, full_value=full_value).changes.items()}
        engine.destroy()

        model = attach(Model(checkpointing), subset(("first.weight", "unused.weight")))
        engine = engine_of(model, stage)
        check = UnreachedCheck(attachment_of(model), ranks)
        refused = []
        for step in range(3):
            engine.backward(loss_of(engine, step, mine) * ranks.world_size)
            engine.step()
            try:
                check.after_step(is_last_chance=step == 2)
            except AdapeftError as error:
                refused.append((step, str(error)))
        engine.destroy()
        everyone = ranks.all_gather_object((refused, reached))
        if ranks.rank == 0:
            torch.save(
                {"values": values, "ranks": everyone, "gradients": gradients}, out / f"{stage}-{checkpointing}.pt"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
