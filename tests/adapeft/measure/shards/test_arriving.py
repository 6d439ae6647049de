"""Gradients are folded and freed one by one, in a process of its own and with parameters that only some ranks reach."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapeft.measure.groups import groups_of
from adapeft.measure.measure import measure
from adapeft.measure.shards import arriving
from adapeft.measure.shards.arriving import Backward
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.registry import get_method
from adapeft.ranks import OneRank
from tests.on_ranks.statistics import CASES, passes_for, settings_for
from tests.support.gradients import LiveGradients
from tests.support.tiny import make_bert

FOLDED = ["sam", "sam-by-tensor", "snip", "fish", "child-tuning-d", "tensor", "row", "element", "options"]


@pytest.mark.parametrize("case", FOLDED)
def test_one_gradient_is_alive_at_a_time(case, monkeypatch):
    monkeypatch.setitem(CASES, "child-tuning-d", {"method": "child-tuning-d"})
    model = make_bert().eval()
    live = LiveGradients(model.parameters())
    settings = settings_for(case)
    groups = groups_of(model, settings)
    shards = WholeModel(model, [info.name for info in groups.parameters], groups.always_train)
    method = get_method(settings.method)
    measure(method, passes_for(model, shards, by_example=method.measures_examples), groups, settings)
    assert 0 < live.peak <= max(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", ["sam", "snip"])
def test_parts_of_micro_batches_are_folded_at_once(case):
    model = make_bert().eval()
    live = LiveGradients(model.parameters())
    settings = settings_for(case)
    groups = groups_of(model, settings)
    shards = WholeModel(model, [info.name for info in groups.parameters], groups.always_train, num_micro=2)
    measure(get_method(settings.method), passes_for(model, shards), groups, settings)
    assert 0 < live.peak <= max(parameter.numel() for parameter in model.parameters())


class TwoAlike(OneRank):
    """One of two ranks, whose other one computes the same except for the parameters in ``missing``."""

    world_size = 2

    def __init__(self, missing=()):
        self.missing, self.sums = missing, []

    def all_reduce(self, tensor):
        if tensor.dtype == torch.int64:
            others = tensor.clone()
            others[list(self.missing)] = 0
            return tensor.add_(others)
        self.sums.append(len(tensor))
        return tensor.mul_(2)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.expert, self.unused, self.last = (nn.Linear(2, 2, bias=False) for _ in range(4))

    def forward(self, x):
        return self.last(self.expert(self.first(x)).tanh()).sum()


def arrivals(missing, bucket, monkeypatch):
    monkeypatch.setattr(arriving, "BUCKET", bucket)
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(3, 2)
    parameters = list(model.parameters())
    ranks, found = TwoAlike(missing), []
    backward = Backward(parameters, [parameter.numel() for parameter in parameters], ranks)
    computed = backward.run(model(x), lambda place, gradient: found.append((place, gradient.clone())))
    assert computed == {0, 1, 3}
    assert all(parameter.grad is None for parameter in parameters)
    expected = torch.autograd.grad(model(x), [parameters[place] for place, _ in found])
    for (_, gradient), plain in zip(found, expected, strict=True):
        assert torch.equal(gradient, 2 * plain.flatten())
    return [place for place, _ in found], ranks.sums


def test_small_gradients_are_summed_together_and_large_ones_alone(monkeypatch):
    assert arrivals((), 8, monkeypatch) == ([3, 1, 0], [8, 4])
    assert arrivals((), 4, monkeypatch) == ([3, 1, 0], [4, 4, 4])
    assert arrivals((), 3, monkeypatch) == ([3, 1, 0], [4, 4, 4])


def test_what_only_some_ranks_reach_follows_at_the_end(monkeypatch):
    """Otherwise they would sum it with another parameter's gradient on the ranks that do not reach it."""
    assert arrivals((1,), 8, monkeypatch) == ([3, 0, 1], [8, 4])


def test_a_rank_that_does_not_reach_a_parameter_takes_part_in_its_sum():
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(3, 2)
    parameters = list(model.parameters())

    class Other(TwoAlike):
        """One of two ranks, whose other one reaches ``unused`` too."""

        def all_reduce(self, tensor):
            return tensor.add_(torch.ones_like(tensor)) if tensor.dtype == torch.int64 else super().all_reduce(tensor)

    found = {}
    backward = Backward(parameters, [4] * 4, Other())
    computed = backward.run(model(x), lambda place, gradient: found.update({place: gradient.clone()}))
    assert computed == {0, 1, 3}
    assert sorted(found) == [0, 1, 2, 3]
    assert torch.equal(found[2], torch.zeros(4))
