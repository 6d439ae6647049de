"""Memory estimates against tensors that were really allocated and the formulas of ZeRO."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from adapeft.memory.activations import count_pass
from adapeft.memory.estimate import Load, Pass, Zero, bytes_per_element, memory, moments, offloaded, traffic
from adapeft.parts.elements import Elements
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tasks.losses.cross_entropy import Classification, NextToken
from adapeft.tune.attach import attach
from tests.support.tiny import make_bert, make_gpt2

NUM_EXAMPLES, NUM_TOKENS = 4, 9
NOTHING = Pass(0, 0)
ONE = Zero(stage=0, workers=1, persistence_threshold=0, reduce_bucket=10**9, live=10**9)


def subset_of(model: nn.Module, kind: str) -> Subset:
    """Return a subset with one part of this kind for every matrix of the blocks."""
    parts = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if parameter.ndim == 2 and ("layer" in name or ".h." in name):
            dim = 1 if ".c_" in name else 0
            parts[name] = {
                "tensor": Whole(shape),
                "rows": Rows(shape, torch.arange(shape[dim] // 2), dim),
                "elements": Elements(shape, torch.arange(9)),
            }[kind]
    return Subset(parts)


def prepare(kind: str | None, checkpointing: bool, model: nn.Module) -> None:
    if kind is not None:
        attach(model, subset_of(model, kind))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def saved_bytes(model: nn.Module, objective, labels: torch.Tensor) -> int:
    """Return the bytes of distinct storages that autograd saves for a real backward pass, except the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # keeps the tensor, so its address is not reused
        return tensor

    ids = torch.zeros(NUM_EXAMPLES, NUM_TOKENS, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        objective.loss_sum(logits, labels)
    inputs = 2 * ids.untyped_storage().nbytes()
    return sum(size for size, _ in kept.values()) - inputs


@pytest.mark.parametrize("kind", [None, "tensor", "rows", "elements"])
@pytest.mark.parametrize(("make", "task"), [(make_bert, "sequence-classification"), (make_gpt2, "causal-lm")])
def test_activations_are_what_autograd_keeps(make, task, kind):
    """The estimate includes other live tensors: about one layer's worth in a model of two layers."""
    model = make()
    objective = NextToken() if task == "causal-lm" else Classification()
    labels = torch.zeros((NUM_EXAMPLES, NUM_TOKENS) if task == "causal-lm" else NUM_EXAMPLES, dtype=torch.int64)
    counted = count_pass(
        model.config, task, partial(prepare, kind, False), objective, num_examples=NUM_EXAMPLES, num_tokens=NUM_TOKENS
    )
    prepare(kind, False, model)
    assert sum(counted.sizes) == sum(parameter.numel() for parameter in model.parameters())
    assert counted.num_trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = saved_bytes(model, objective, labels)
    assert saved <= counted.passes.activations <= 1.35 * saved
    gradients = 4 * counted.num_trained
    assert gradients <= counted.passes.with_gradients <= counted.passes.activations + gradients


@pytest.mark.slow
def test_checkpointing_keeps_little_more_than_a_layer():
    config = make_bert().config
    config.num_hidden_layers = 12
    activations = [
        count_pass(
            config,
            "sequence-classification",
            partial(prepare, None, checkpointing),
            Classification(),
            num_examples=32,
            num_tokens=16,
        ).passes.activations
        for checkpointing in (True, False)
    ]
    assert activations[0] < 0.4 * activations[1]


def test_bytes_of_plain_training_are_those_of_its_tensors():
    """One process, stage 0: weights, gradients and Adam's moments after a real step."""
    model = make_bert()
    model.bert.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    trained = sum(parameter.numel() for parameter in optimizer.param_groups[0]["params"])

    held = memory(Load([p.numel() for p in model.parameters()], 4, trained, trained, NOTHING, num_micro=2), ONE)
    assert held.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert held.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert held.optimizer == sum(moment.nbytes for moment in moved)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_stages_divide_as_zero_does(workers):
    """Rajbhandari et al. 2020, figure 1, in bfloat16 and with gradients of two bytes: 2Ψ, 2Ψ, 12Ψ."""
    psi = 8 * 10**6
    piece = psi // 1000
    load = Load([piece] * 1000, 2, psi, psi, Pass(1000, 1000), num_micro=2)
    held = {stage: moments(load, replace(ONE, stage=stage, workers=workers, live=0))[0] for stage in range(4)}
    assert (held[0].weights, held[0].gradients, held[0].optimizer) == (2 * psi, 2 * psi, 12 * psi)
    assert held[1].optimizer == held[2].optimizer == held[3].optimizer == 12 * psi // workers
    assert held[1].weights == held[2].weights == 2 * psi
    assert held[3].gradients == 2 * psi // workers
    assert held[3].weights == 2 * psi // workers + (2 * piece if workers > 1 else 0)  # one is gathered at a time


def test_stage_3_keeps_small_parameters_whole_and_gathers_large_ones():
    zero = Zero(stage=3, workers=4, persistence_threshold=100, reduce_bucket=10**9, live=500)
    load = Load([100, 101, 1000], 4, 0, 0, NOTHING)
    assert moments(load, zero)[0].weights == 4 * (-(-1201 // 4) + 100 + 1000)  # more than ``live``: the largest one
    assert moments(load, replace(zero, live=1050))[0].weights == 4 * (-(-1201 // 4) + 100 + 1050)
    assert moments(load, replace(zero, live=10**6))[0].weights == 4 * (-(-1201 // 4) + 1201)


@pytest.mark.parametrize("workers", [1, 4])
def test_offloaded_weights_leave_the_device_except_one_piece(workers):
    zero = Zero(3, workers, persistence_threshold=100, reduce_bucket=10**9, live=500, offload="cpu")
    load = Load([100, 101, 1000], 2, 0, 0, NOTHING)
    assert moments(load, zero)[0].weights == 2 * (100 + 1000)
    assert offloaded(load, zero) == 2 * -(-1201 // workers)
    for kept in (replace(zero, offload="none"), replace(zero, stage=2)):
        assert offloaded(load, kept) == 0
        assert moments(load, kept)[0].weights >= 2 * 1201 // workers


def test_a_frozen_model_pays_for_its_subset_alone():
    zero = Zero(stage=3, workers=2, persistence_threshold=10**6, reduce_bucket=5 * 10**8, live=10**9)
    frozen = Load([10**8], 4, 0, 0, NOTHING)
    some = replace(frozen, num_trained=1000, num_stepped=1000)
    assert memory(some, zero).total - memory(frozen, zero).total < 40 * 1000


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("whole", [False, True])
def test_bytes_of_an_element_are_what_memory_grows_by(stage, workers, element_bytes, whole):
    zero = Zero(stage, workers, persistence_threshold=10**6, reduce_bucket=5 * 10**8, live=10**9)
    fixed = Load([10**7], element_bytes, 0, 0, Pass(7000, 7000), num_micro=2)
    count = 6000
    more = replace(
        fixed,
        sizes=[10**7] if whole else [10**7, count],
        num_trained=count,
        num_stepped=count,
        base=4 * count if whole else 0,
    )
    costs = bytes_per_element(zero, element_bytes, has_leaf=not whole, keeps_base=whole)
    for cost, after, before in zip(costs, moments(more, zero), moments(fixed, zero), strict=True):
        assert cost * count == pytest.approx(after.total - before.total, abs=32)


def test_traffic_is_that_of_zero():
    """Section 7 of the paper: 2Ψ for gradients at stage 0, 3Ψ for gradients and weights at stage 3."""
    psi, workers = 10**6, 4
    load = Load([psi], 2, psi, psi, NOTHING)
    ring = (workers - 1) / workers

    def sent(stage: int) -> int:
        return sum(traffic(load, replace(ONE, stage=stage, workers=workers, live=0)).values())

    assert sent(0) == 2 * 2 * psi * ring
    assert sent(2) == 3 * 2 * psi * ring  # DeepSpeed all-reduces where the paper reduce-scatters
    assert sent(3) == 3 * 2 * psi * ring
    assert sum(traffic(load, ONE).values()) == 0


def test_quantized_weights_are_sent_as_they_are_stored():
    load = Load([], 2, 0, 0, NOTHING, packed=10**6)
    zero = replace(ONE, stage=3, workers=4)
    assert traffic(load, zero) == {"gradients": 0, "weights": 0.75 * 10**6}
    assert traffic(load, replace(zero, live=0))["weights"] == 2 * 0.75 * 10**6
    assert traffic(load, replace(zero, stage=2))["weights"] == 0


@pytest.mark.parametrize(("stage", "gradients"), [(1, 4 * 10**6), (3, 0)])
def test_the_heap_keeps_the_activations_while_stepping(stage, gradients):
    zero = replace(ONE, stage=stage, workers=2)
    without = Load([10**6], 4, 10**6, 10**6, Pass(10**7, 10**7))
    difference = moments(replace(without, heap=8 * 10**6), zero)[1].total - moments(without, zero)[1].total
    assert difference == 8 * 10**6 - gradients  # below stage 3 they are in the heap, and counted already
    assert moments(replace(without, heap=10), zero)[1].allocator == (10 if stage == 3 else 0)
