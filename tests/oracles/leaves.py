"""Dense counterparts of leaves and deltas, and subsets and training for their tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from adapeft.model.structure import new_parameters
from adapeft.parts.elements import Elements
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.support.tiny import make_batches

SUBSETS = ("tensor", "row", "element", "mixed")


def densify(part: Part, values: Tensor) -> Tensor:
    """Return a leaf's values at their positions in zeros of the parameter's shape."""
    dense = torch.zeros(part.shape, dtype=values.dtype)
    if part.kind == "elements":
        dense.view(-1)[part.indices] = values
    elif part.kind == "rows":
        dense.movedim(part.dim, 0)[part.indices] = values
    else:
        dense += values
    return dense


def gather(part: Part, dense: Tensor) -> Tensor:
    """Return the entries of a dense tensor that a part trains, in the shape of its leaf."""
    if part.kind == "elements":
        return dense.flatten()[part.indices]
    return dense.movedim(part.dim, 0)[part.indices] if part.kind == "rows" else dense


def inside(part: Part | None, shape: torch.Size) -> Tensor:
    """Return the mask of entries that a part trains, bool; all False without a part."""
    if part is None:
        return torch.zeros(shape, dtype=torch.bool)
    return densify(part, torch.ones(part.value_shape)).bool()


def make_subset(model: nn.Module, kind: str) -> Subset:
    """Return about a tenth of every third parameter as tensors, rows, elements or a mix, and the new head."""
    generator = torch.Generator().manual_seed(2)
    always = new_parameters(model)
    names = [name for name, _ in model.named_parameters() if name not in always]
    parameters = dict(model.named_parameters())
    parts = {}
    for position, name in enumerate(names[::3]):
        shape = tuple(parameters[name].shape)
        own = ("tensor", "row", "element")[position % 3] if kind == "mixed" else kind
        if own == "element":
            limit, dim = parameters[name].numel(), 0
        elif own == "row" and len(shape) == 2:
            dim = 1 if ".h." in name else 0  # Conv1D keeps its output neurons in columns
            limit = shape[dim]
        else:
            if own == "tensor" and len(shape) == 1:
                parts[name] = Whole(shape)
            continue
        indices = torch.randperm(limit, generator=generator)[: max(1, limit // 10)].sort().values
        parts[name] = Elements(shape, indices) if own == "element" else Rows(shape, indices, dim)
    return Subset(parts, always, always)


def train(model: nn.Module, steps: int = 4, learning_rate: float = 3e-2) -> torch.optim.Optimizer:
    """Train all parameters that require a gradient, by AdamW with weight decay."""
    torch.manual_seed(3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.1)
    for batch in make_batches(model)[:steps]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return the logits of the first batch, without dropout."""
    return model.eval()(**make_batches(model)[0]).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return by name the mask of entries whose bits differ, bool."""
    return {name: before[name].view(torch.uint8).ne(after[name].view(torch.uint8)).view(
        *before[name].shape, before[name].element_size()).any(-1) for name in before}  # fmt: skip


def trained_delta(make: Callable[[], nn.Module], kind: str = "mixed", /, **description: object):
    """Return (delta, attached model) after a few training steps on a new model."""
    from adapeft import attach, delta

    model = make()
    attach(model, make_subset(model, kind))
    train(model)
    return delta(model, description), model
