"""Dense implementation of methods with a moving mask: full copies, full masks, one process, plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR
from transformers.pytorch_utils import Conv1D

import adapeft
from adapeft.draw import uniform
from adapeft.methods.base.rule import describe_rule
from adapeft.methods.registry import METHODS
from adapeft.model.structure import new_parameters
from adapeft.parts.dense import Dense
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from tests.support.tiny import make_batches

SEED, BUDGET, LEARNING_RATE, DECAY, CLIP, NUM_STEPS = 5, 400, 0.02, 0.1, 0.5, 6
# Softmax does not depend on a bias of the keys: its gradient is rounding, to which Adam would apply full steps.
BLIND = ("key.bias", "c_attn.bias")
CASES: dict[str, tuple[str, dict]] = {
    "mixout": ("mixout", {"probability": 0.6}),
    "mixout-reset": ("mixout-reset", {"probability": 0.5}),
    "child-tuning-f": ("child-tuning-f", {"probability": 0.4}),
    "child-pruning": ("child-pruning", {"projection_interval": 4}),
    # A penalty and gates that have an effect within a few steps of a tiny model.
    "diff-pruning": ("diff-pruning", {"penalty": 1e-3, "gate_start": 0.7, "structured": False}),
    "diff-pruning, structured": ("diff-pruning", {"penalty": 1e-3, "gate_start": 0.7}),
}


def falling(step: int) -> float:
    return 1 - step / (2 * NUM_STEPS)


def make_model(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model in training mode without dropout, whose random numbers depend on the world size."""
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def dense_subset(model: nn.Module, case: str) -> Subset:
    """Return a dense subset of all parameters except the head and those without a gradient."""
    method, given = CASES[case]
    new = new_parameters(model)
    parts = {
        name: Dense(tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if name not in new and not name.endswith(BLIND)
    }
    budget = BUDGET if method in ("mixout-reset", "child-pruning", "diff-pruning") else None
    rule = describe_rule(METHODS[method].options(method=method, **given), SEED, budget)
    return Subset(parts, new, new, Choice(method=method, rule=rule))


def train_with_adapeft(make: Callable[[], nn.Module], case: str) -> tuple[adapeft.Delta, list[float]]:
    """Train with the library in a custom training loop."""
    model = make_model(make)
    adapeft.attach(model, dense_subset(model, case))
    optimizer = torch.optim.AdamW(adapeft.parameter_groups(model, LEARNING_RATE, DECAY))
    adapeft.follow_rule(model, optimizer, num_steps=NUM_STEPS)
    schedule, losses = LambdaLR(optimizer, falling), []
    for batch in make_batches(model, num_batches=NUM_STEPS + 1)[:NUM_STEPS]:
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return adapeft.delta(model), losses


def train_densely(make: Callable[[], nn.Module], case: str) -> tuple[dict[str, Tensor], list[float]]:
    """Return θ − θ⁰ by name with the head's values, and losses, of the same training, computed independently."""
    method, given = CASES[case]
    model, oracle = make_model(make), _Dense(method, given)
    new = new_parameters(model)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [name for name in base if name not in new and not name.endswith(BLIND)]
    difference = {name: torch.zeros_like(base[name], requires_grad=True) for name in trained}
    gate = {name: torch.full_like(base[name], 0.7, requires_grad=True) for name in trained}
    tensor_gate = {name: torch.full((1,), 0.7, requires_grad=True) for name in trained}
    head = {name: base[name].clone().requires_grad_() for name in new}
    inputs = _input_dims(model)
    weights = [*difference.values(), *head.values()]
    gates = [*gate.values(), *tensor_gate.values()] if oracle.structured else list(gate.values())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "lr": LEARNING_RATE, "weight_decay": DECAY},
        {"params": [w for w in weights if w.ndim <= 1], "lr": LEARNING_RATE, "weight_decay": 0.0},
    ]
    if method == "diff-pruning":
        groups.append({"params": gates, "lr": 0.1, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    schedule, losses, mask = LambdaLR(optimizer, falling), [], None

    def added(name: str, step: int, training: bool) -> Tensor:
        if method.startswith("mixout") and training:
            return oracle.mixed(base[name], difference[name], name, step, inputs.get(name))
        if method == "diff-pruning":
            z = oracle.gate(gate[name], f"{name} gate", step, training)
            if oracle.structured:
                z = z * oracle.gate(tensor_gate[name], f"{name} tensor_gate", step, training)
            return (mask[name] if mask is not None else z) * difference[name]
        return difference[name]

    def keep_largest(scores: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = torch.cat([scores[name].flatten() for name in trained])
        kept = torch.zeros_like(flat)
        kept[flat.argsort(descending=True, stable=True)[:BUDGET]] = 1
        pieces = kept.split([base[name].numel() for name in trained])
        return {name: piece.view(base[name].shape) for name, piece in zip(trained, pieces, strict=True)}

    def reset(kept: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name in trained:
                difference[name].mul_(kept[name])

    for step, batch in enumerate(make_batches(model, num_batches=NUM_STEPS + 1)[:NUM_STEPS]):
        parameters = {**base, **{name: base[name] + added(name, step, True) for name in trained}, **head}
        loss = functional_call(model, parameters, kwargs=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], CLIP)
        if method == "diff-pruning" and mask is None:
            (given["penalty"] * sum(torch.sigmoid(alpha - math.log(1.5 / 1.5)).sum() for alpha in gates)).backward()
        if method == "child-tuning-f":
            for name in trained:
                p = given["probability"]
                difference[name].grad *= (uniform(SEED, step, name, base[name].shape, "cpu") < p).float() / p
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if method == "child-pruning" and (step + 1) % 4 == 0:
            reset(keep_largest({name: difference[name].abs() for name in trained}))
        if method == "diff-pruning" and step + 1 == 3:
            with torch.no_grad():
                for name in trained:
                    difference[name].copy_(added(name, step, False))
                mask = keep_largest({name: difference[name].abs() for name in trained})
                reset(mask)
    if method == "child-pruning":
        reset(keep_largest({name: difference[name].abs() for name in trained}))
    if method == "mixout-reset":
        reset(keep_largest({n: 1 - uniform(SEED, 0, f"{n} kept", base[n].shape, "cpu") for n in trained}))
    values = {name: added(name, NUM_STEPS, False).detach() for name in trained}
    return {**values, **{name: value.detach() for name, value in head.items()}}, losses


def dense_values(delta: adapeft.Delta, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Return a delta as dense tensors of the parameters' shapes, with the head's values."""
    values = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, change in delta.changes.items():
        change.add_to(name, values[name])
    return {**values, **delta.new}


class _Dense:
    """The formulas as in the papers."""

    def __init__(self, method: str, given: dict) -> None:
        self.probability = given.get("probability", 0.0)
        self.structured = method == "diff-pruning" and given.get("structured", True)

    def mixed(self, base: Tensor, difference: Tensor, name: str, step: int, input_dim: int | None) -> Tensor:
        if input_dim is None:
            return difference
        p, tuned = self.probability, base + difference
        m = (uniform(SEED, step, name, (base.shape[input_dim],), "cpu") >= p).float()
        m = m.unsqueeze(1 - input_dim).expand_as(base)
        return ((1 - m) * base + m * tuned - p * base) / (1 - p) - base

    def gate(self, alpha: Tensor, draw: str, step: int, training: bool) -> Tensor:
        u = uniform(SEED, step, draw, alpha.shape, "cpu").clamp(1e-6, 1 - 1e-6)
        noise = u.log() - (1 - u).log() if training else 0.0
        return (1 / (1 + torch.exp(-(noise + alpha))) * 3.0 - 1.5).clamp(0, 1)


def _input_dims(model: nn.Module) -> dict[str, int]:
    """Return the input dimension of every matrix that only linear layers use."""
    dims = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and name != "lm_head":  # tied to the embedding
            dims[f"{name}.weight"] = 1 if type(module) is nn.Linear else 0
    return dims
