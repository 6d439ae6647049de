"""Direct float64 computation, for tiny models, of the quantities that measuring and choosing estimate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from adapeft.data.description import Batch
from adapeft.measure.groups import Groups
from adapeft.tasks.inference import infer_objective
from adapeft.tasks.losses.objective import Objective


def in_double(model: nn.Module) -> nn.Module:
    """Return a float64 copy without dropout, with all parameters trainable."""
    return copy.deepcopy(model).double().eval().requires_grad_(True)


def num_predictions(batch: Mapping[str, Tensor]) -> int:
    """Return the number of examples, or of tokens that a language model predicts."""
    labels = batch["labels"]
    return len(labels) if labels.ndim == 1 else int((labels[:, 1:] != -100).sum())


def gradients(model: nn.Module, batch: Mapping[str, Tensor], groups: Groups) -> list[Tensor]:
    """Return the gradient of transformers' mean loss, one flat float64 tensor per candidate."""
    model = in_double(model)
    return _gradients_of(model(**batch).loss, model, groups)


def mean_gradients(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], groups: Groups) -> list[Tensor]:
    """Return the gradient of the mean loss over all predictions of ``batches``."""
    counts = [num_predictions(batch) for batch in batches]
    each = [gradients(model, batch, groups) for batch in batches]
    return [sum(n * g for n, g in zip(counts, pieces, strict=True)) / sum(counts) for pieces in zip(*each, strict=True)]


def sampled(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], seed: int) -> list[dict[str, Tensor]]:
    """Return the batches with labels sampled from the model; examples are numbered across batches."""
    relabelled, seen = [], 0
    model = copy.deepcopy(model).eval()
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        ids = torch.arange(seen, seen + len(batch["labels"]))
        seen += len(ids)
        objective = infer_objective(model, batch["labels"])
        with torch.no_grad():
            labels = objective.sample_labels(model(**inputs).logits, Batch(inputs, batch["labels"], ids), seed)
        relabelled.append({**inputs, "labels": labels})
    return relabelled


def class_scores(model: nn.Module, batch: Mapping[str, Tensor], groups: Groups) -> list[tuple[float, list[Tensor]]]:
    """Return p / n and the gradient of −log p for each example and class; the second moment is Fisher's matrix."""
    model = in_double(model)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    log_p = logits.log_softmax(-1)
    return [
        (log_p[row, label].exp().item() / len(logits), _gradients_of(-log_p[row, label], model, groups, retain=True))
        for row, label in product(range(len(logits)), range(logits.shape[1]))
    ]


def group_of_elements(groups: Groups) -> list[Tensor]:
    """Return for each candidate the group of every element, flat int64."""
    found, offset = [], 0
    roles = sorted({info.role for info in groups.parameters}, key=[info.role for info in groups.parameters].index)
    for info in groups.parameters:
        position = torch.arange(info.count)
        if groups.granularity == "role":
            found.append(torch.full_like(position, roles.index(info.role)))
            continue
        if groups.granularity != "row" or len(info.shape) != 2:
            found.append(torch.full_like(position, offset))
            offset += 1
            continue
        row, column = position // info.shape[1], position % info.shape[1]
        found.append(offset + (row if info.output_dim == 0 else column))
        offset += info.shape[info.output_dim]
    return found


def group_sums(groups: Groups, values: Sequence[Tensor]) -> np.ndarray:
    """Return the sums of elements' values (one flat tensor per candidate) over each group, float64 [K]."""
    of = torch.cat(group_of_elements(groups))
    return (
        torch.zeros(int(of.max()) + 1, dtype=torch.float64).index_add(0, of, torch.cat(list(values)).double()).numpy()
    )


def top_k_by_sort(scores: Tensor, k: int) -> list[int]:
    """Return the ascending positions of the k largest positive scores; ties go to lower positions."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return sorted(i for i in order[:k] if float(scores[i]) > 0)


def best_subset_value(values: np.ndarray, costs: np.ndarray, budget: int) -> float:
    """Return the knapsack's optimum over all 2^K subsets."""
    masks = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
    return float((masks @ values)[masks @ costs <= budget].max())


def _gradients_of(loss: Tensor, model: nn.Module, groups: Groups, retain: bool = False) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    wanted = [parameters[info.name] for info in groups.parameters]
    found = torch.autograd.grad(loss, wanted, retain_graph=retain, allow_unused=True)
    return [
        (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
        for parameter, gradient in zip(wanted, found, strict=True)
    ]


def check_curvature_of_classes(
    model: nn.Module, objective: Objective, batch: Batch, *, reaches_all: bool = True
) -> None:
    """Check that the mean over draws of T (g̃·d)² is dᵀJᵀHJd, with H of the softmax over the classes.

    Args:
        model: float64 model, whose attention has a forward derivative.
        objective: objective of the task.
        batch: batch of which every label counts.
        reaches_all: whether the loss depends on every parameter.
    """

    def exact(logits: Tensor, change: Tensor) -> float:
        p = logits.softmax(-1)
        return float(((p * change**2).sum(-1) - (p * change).sum(-1) ** 2).mean())

    def outputs(model: Callable[..., Any]) -> Tensor:
        return objective.logits_in(model(**batch.inputs))

    def loss(seed: int) -> Tensor:
        return objective.loss(model, batch, sample_seed=seed)

    check_curvature(model, outputs, exact, loss, objective.num_predictions(batch.labels), reaches_all=reaches_all)


def check_curvature(
    model: nn.Module,
    outputs: Callable[[Callable[..., Any]], Tensor],
    exact: Callable[[Tensor, Tensor], float],
    loss: Callable[[int], Tensor],
    num_predictions: int,
    *,
    reaches_all: bool = True,
) -> None:
    """Check that the mean over draws of T (g̃·d)² is dᵀJᵀHJd.

    Args:
        model: float64 model, whose attention has a forward derivative.
        outputs: function from the model, called as it is, to the outputs that the loss depends on.
        exact: function from these outputs and their change along d to dᵀJᵀHJd of the mean loss.
        loss: function from a seed to the sum of the loss at labels sampled from the model.
        num_predictions: number T of its terms.
        reaches_all: whether the loss depends on every parameter.
    """
    num_draws, parameters = 300, list(model.parameters())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    along = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in weights.items()}

    def outputs_at(weights: dict[str, Tensor]) -> Tensor:
        return outputs(lambda **inputs: functional_call(model, weights, kwargs=inputs))

    expected = exact(*jvp(outputs_at, (weights,), (along,)))
    squares = []
    for seed in range(num_draws):
        gradient = torch.autograd.grad(loss(seed) / num_predictions, parameters, materialize_grads=not reaches_all)
        slope = float(sum((g * d).sum() for g, d in zip(gradient, along.values(), strict=True)))
        squares.append(num_predictions * slope**2)
    draws = torch.tensor(squares, dtype=torch.float64)
    error = float(draws.std() / num_draws**0.5)
    assert abs(float(draws.mean()) - expected) < 4 * error
    assert error < 0.15 * expected
