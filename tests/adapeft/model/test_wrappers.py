"""Tests of models as trainers wrap them: public functions find the inner model or say what to pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, inject_adapter_in_model, prepare_model_for_kbit_training
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import adapeft
from adapeft import AdapeftError
from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import SUBSETS, logits, make_subset, train, weights
from tests.support.tiny import make_batches, make_bert, make_gpt2


@pytest.fixture
def one_rank(tmp_path):
    """Create a process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("wrap", [compiled, DataParallel, AveragedModel])
def test_select_sees_the_model_inside(wrap):
    expected = adapeft.select(make_bert(), make_batches(make_bert()), budget="10%", groups="row", warmup_steps=4)
    found = adapeft.select(wrap(make_bert()), make_batches(make_bert()), budget="10%", groups="row", warmup_steps=4)
    assert (found.parts.keys(), found.new) == (expected.parts.keys(), expected.new)
    assert found.choice.budget == expected.choice.budget


def test_select_sees_the_model_inside_distributed_data_parallel(one_rank):
    expected = adapeft.select(make_bert(), make_batches(make_bert()), budget="10%", groups="row", warmup_steps=4)
    wrapped = DistributedDataParallel(make_bert())
    found = adapeft.select(wrapped, make_batches(make_bert()), budget="10%", groups="row", warmup_steps=4)
    assert (found.parts.keys(), found.new) == (expected.parts.keys(), expected.new)


@pytest.mark.parametrize("wrap", [pytest.param(compiled, marks=pytest.mark.slow), in_place, DataParallel])
def test_a_wrapped_model_trains_what_is_attached(wrap):
    """The wrapped model has run before, so a compiled model must be compiled again."""
    model, expected = make_bert().eval(), make_bert().eval()
    wrapped = wrap(model)
    with torch.no_grad():
        wrapped(**make_batches(model)[0])
    assert adapeft.attach(wrapped, make_subset(model, "mixed")) is wrapped
    adapeft.attach(expected, make_subset(expected, "mixed"))
    for one in (wrapped, expected):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for batch in make_batches(model)[:3]:
            one(**batch).loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    found, reference = adapeft.delta(wrapped), adapeft.delta(expected)
    assert found.changes.keys() == reference.changes.keys()
    for name, change in found.changes.items():
        torch.testing.assert_close(change.values, reference.changes[name].values, rtol=1e-4, atol=1e-6)
    base = make_bert()
    found.apply(wrap(base))
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)
    before = logits(make_bert())
    adapeft.detach(wrapped)
    with torch.no_grad():
        model.classifier.load_state_dict(make_bert().classifier.state_dict())
        torch.testing.assert_close(wrapped(**make_batches(model)[0]).logits, before)


def test_names_of_a_delta_are_those_of_the_model(one_rank):
    """The model is wrapped after attaching, as trainers do, also inside."""
    model = adapeft.attach(make_bert(), make_subset(make_bert(), "mixed"))
    names = set(attachment_of(model).owners)
    for index, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[index] = checkpoint_wrapper(layer)
    wrapped = compiled(DistributedDataParallel(model, find_unused_parameters=True))
    train(wrapped.module)
    found = adapeft.delta(wrapped)
    assert {*found.changes, *found.new} == names
    base = make_bert()
    found.apply(base)
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)


def test_an_average_of_an_attached_model_has_a_delta_of_its_own():
    model = adapeft.attach(make_bert(), make_subset(make_bert(), "mixed"))
    average = AveragedModel(model)
    train(model)
    first = adapeft.delta(model)
    average.update_parameters(model)
    train(model)
    average.update_parameters(model)
    second, mean = adapeft.delta(model), adapeft.delta(average)
    for name, change in mean.changes.items():
        expected = (first.changes[name].values + second.changes[name].values) / 2
        torch.testing.assert_close(change.values, expected, rtol=1e-4, atol=1e-6)


def test_attaching_inside_distributed_data_parallel_is_refused(one_rank):
    wrapped = DistributedDataParallel(make_bert())
    with pytest.raises(AdapeftError, match=r"attach: the model is wrapped in DistributedDataParallel.*wrap it after"):
        adapeft.attach(wrapped, make_subset(wrapped.module, "row"))
    assert all(parameter.requires_grad for parameter in wrapped.parameters())


LORA = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])


def test_models_of_peft_are_refused_with_what_to_pass():
    subset, wrapped = make_subset(make_bert(), "row"), get_peft_model(make_bert(), LORA)
    injected = inject_adapter_in_model(LORA, make_bert())
    delta = adapeft.Delta({}, {}, "f" * 64)
    for call in (
        lambda model: adapeft.select(model, make_batches(make_bert())),
        lambda model: adapeft.attach(model, subset),
        delta.apply,
        lambda model: adapeft.Deltas(model, {"one": delta}),
    ):
        with pytest.raises(AdapeftError, match=r"PeftModelForSequenceClassification.*model\.unload"):
            call(wrapped)
        with pytest.raises(AdapeftError, match=r"query' is a PEFT layer.*model\.unload"):
            call(injected)
    assert (
        not weights(adapeft.attach(wrapped.unload(), subset)).keys()
        & weights(wrapped).keys() - weights(make_bert()).keys()
    )


def test_peft_on_an_attached_model_is_refused_before_it_trains():
    model = adapeft.attach(make_bert(), make_subset(make_bert(), "row"))
    wrapped = get_peft_model(model, LORA)
    with pytest.raises(AdapeftError, match=r"are frozen.*peft_config"):
        wrapped.train()(**make_batches(make_bert())[0])
    with pytest.raises(AdapeftError, match="PeftModelForSequenceClassification"):
        adapeft.delta(wrapped)
    with pytest.raises(AdapeftError, match="PEFT has added a layer to the model"):
        adapeft.delta(model)


@pytest.mark.parametrize("freeze", [lambda model: model.requires_grad_(False), prepare_model_for_kbit_training])
def test_a_subset_frozen_later_is_refused_before_it_trains_and_has_no_delta(freeze):
    model = adapeft.attach(make_bert(), make_subset(make_bert(), "mixed"))
    freeze(model)
    with torch.no_grad():
        model.train()(**make_batches(model)[0])
    model.eval()(**make_batches(model)[0])
    with pytest.raises(AdapeftError, match=r"9 of the 9 trained parts of the subset are frozen"):
        model.train()(**make_batches(model)[0])
    with pytest.raises(AdapeftError, match=r"9 trained parts of the subset are frozen, such as 'bert"):
        adapeft.delta(model)


def test_a_trained_subset_may_be_frozen_for_inference():
    model = adapeft.attach(make_bert(), make_subset(make_bert(), "row"))
    train(model)
    expected = adapeft.delta(model)
    found = adapeft.delta(model.requires_grad_(False))
    assert all(torch.equal(found.changes[name].values, change.values) for name, change in expected.changes.items())


def test_a_module_replaced_later_is_refused():
    model = adapeft.attach(make_bert(), make_subset(make_bert(), "row"))
    train(model)
    model.bert.embeddings.word_embeddings = nn.Embedding(29, 12)
    with pytest.raises(AdapeftError, match=r"trains 'bert\.embeddings\.word_embeddings\.weight' is no longer in the"):
        adapeft.delta(model)


def test_a_delta_of_nothing_says_so():
    model = adapeft.attach(make_bert(), make_subset(make_bert(), "row"))
    train(copy.deepcopy(model))
    with pytest.warns(UserWarning, match=r"none of the \d+ parts of the subset has changed since adapeft\.attach"):
        adapeft.delta(model)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", [*SUBSETS, "tied"])
def test_loading_a_state_dict_is_seen_by_the_delta(assign, kind):
    make = make_gpt2 if kind == "tied" else make_bert
    subset = Subset({"transformer.wte.weight": Rows((29, 12), torch.tensor([1, 5]))})
    subset = subset if kind == "tied" else make_subset(make_bert(), kind)
    trained, model = adapeft.attach(make(), subset), adapeft.attach(make(), subset)
    train(trained)
    model.load_state_dict(copy.deepcopy(trained.state_dict()), assign=assign)
    found, expected = adapeft.delta(model), adapeft.delta(trained)
    assert all(torch.equal(found.changes[name].values, change.values) for name, change in expected.changes.items())
    assert all(torch.equal(found.new[name], value) for name, value in expected.new.items())


def test_a_model_that_has_a_subset_is_neither_measured_nor_patched():
    model = adapeft.attach(make_bert(), make_subset(make_bert(), "row"))
    with pytest.raises(AdapeftError, match=r"has a subset attached.*detach"):
        adapeft.select(model, make_batches(model))
    with pytest.raises(AdapeftError, match=r"has a subset attached.*detach"):
        adapeft.Delta({}, {}, "f" * 64).apply(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_changed_later_is_followed(dtype):
    model, base = adapeft.attach(make_bert(), make_subset(make_bert(), "row")), make_bert()
    model.to(dtype)
    train(model)
    adapeft.delta(model).apply(base)
    close = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits(base), logits(model).float(), **close)
