"""``WholeModel`` and ``measuring_mode``: what is trained while measuring, and that the model is restored."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from adapeft.config.load import parse_select
from adapeft.measure.groups import build_groups
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.mode import measuring_mode
from adapeft.measure.passes import WARMUP_LEARNING_RATE
from adapeft.measure.shards.shards import WholeModel
from adapeft.methods.registry import get_method
from tests.on_ranks.statistics import passes_for
from tests.support.tiny import VOCABULARY


def state_of(model):
    """Return all state of the model that measuring could change."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )


def assert_same(before, after):
    assert before[1:] == after[1:]
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name


def warmed_up(model, num_steps, num_micro=1):
    groups = build_groups(model.eval(), "tensor")
    shards = WholeModel(model, [info.name for info in groups.parameters], groups.always_train, num_micro)
    passes = replace(passes_for(model, shards), warmup_steps=num_steps)
    passes.warm_up(passes.calibration.half_a)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_warm_up_is_adamw_on_the_always_trained_alone(bert):
    reference = copy.deepcopy(bert).eval()
    before = {name: parameter.detach().clone() for name, parameter in bert.named_parameters()}
    after = warmed_up(bert, 5)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}

    groups = build_groups(reference, "tensor")
    passes = passes_for(reference, WholeModel(reference, [], groups.always_train))
    head = list(reference.classifier.parameters())
    optimizer = torch.optim.AdamW(head, weight_decay=0.0)
    for step in range(5):
        batch = passes.collate(passes.calibration.half_a[step % len(passes.calibration.half_a)])
        optimizer.param_groups[0]["lr"] = WARMUP_LEARNING_RATE * (1 - step / 5)
        optimizer.zero_grad()
        reference(**batch.inputs, labels=batch.labels).loss.backward(inputs=head)
        optimizer.step()
    torch.testing.assert_close(after["classifier.weight"], reference.classifier.weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_rank", [False, True])
def test_warm_up_lowers_the_loss_of_a_head_with_large_inputs(low_rank):
    """At WARMUP_LEARNING_RATE a step would change the outputs of this head by about 60."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, num_labels=3, architectures=["LlamaModel"], **sizes)
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.constant_(model.model.norm.weight, 400.0)
    torch.nn.init.normal_(model.score.weight, std=1e-4)
    groups = build_groups(model, "element")
    with seen(model, groups, 2 if low_rank else None, seed=0) as view:
        passes = passes_for(model, view.shards(WholeModel(model, view.names, groups.always_train)))
        passes = replace(passes, warmup_steps=4)
        before = passes.loss(passes.calibration.half_a)
        passes.warm_up(passes.calibration.half_a)
        assert passes.loss(passes.calibration.half_a) < 0.7 * before


def test_each_half_is_measured_behind_a_head_of_its_own(bert):
    """The head fits each half before it is measured, so the head's own gradient nearly vanishes on both."""
    groups = build_groups(bert.eval(), "tensor")
    passes = replace(passes_for(bert, WholeModel(bert, [], groups.always_train)), warmup_steps=400)
    head = list(bert.classifier.parameters())
    seen = []

    class Spy(WholeModel):
        def arriving(self, losses, take, *, by_micro_batch=False):
            self.look(losses)
            super().arriving(losses, take, by_micro_batch=by_micro_batch)

        def arriving_both(self, pairs, receivers):
            self.look([pair.each[0] for pair in pairs])
            super().arriving_both(pairs, receivers)

        def look(self, losses):
            for parameter in head:
                parameter.requires_grad_(True)
            seen.append(torch.cat([g.flatten() for g in torch.autograd.grad(sum(loss(bert) for loss in losses), head)]))

    candidates = [info.name for info in groups.parameters]
    passes = replace(passes, shards=Spy(bert, candidates, groups.always_train))
    get_method("adapeft").measure(passes, groups, parse_select({"groups": "tensor"}))
    size_a, size_b = len(passes.calibration.half_a), len(passes.calibration.half_b)
    assert len(seen) == size_a + size_b, "the direction, then slopes and curvatures"
    for half in (seen[:size_a], seen[size_a:]):
        assert sum(half).norm() < 0.6 * max(gradient.norm() for gradient in half)


def test_warm_up_in_micro_batches(bert):
    whole = warmed_up(copy.deepcopy(bert), 4)
    split = warmed_up(copy.deepcopy(bert), 4, num_micro=3)
    torch.testing.assert_close(split["classifier.weight"], whole["classifier.weight"], rtol=1e-3, atol=1e-4)


def test_no_gradient_reaches_what_is_no_candidate(bert):
    names = ["bert.pooler.dense.weight", "bert.embeddings.LayerNorm.bias"]
    shards = WholeModel(bert.eval(), names)
    passes = passes_for(bert, shards)
    losses, _ = passes._losses(passes.calibration.half_a[0], sampled_labels=False)
    with shards.gradients(losses.losses) as gradients:
        assert [len(gradient) for gradient in gradients] == [144, 12]
        assert {name for name, p in bert.named_parameters() if p.requires_grad} == set(names) == shards.reached
    assert all(parameter.grad is None for parameter in bert.parameters()), "one batch's gradient is not the next one's"


def test_measuring_mode_puts_everything_back(bert):
    bert.train()
    bert.bert.encoder.layer[0].eval()
    bert.bert.embeddings.requires_grad_(False)
    before = state_of(bert)

    def fail_midway():
        with measuring_mode(bert, restore=["classifier.weight"]):
            assert not any(module.training for module in bert.modules())
            bert.requires_grad_(True)
            with torch.no_grad():
                bert.classifier.weight.add_(1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_midway()
    assert_same(before, state_of(bert))
