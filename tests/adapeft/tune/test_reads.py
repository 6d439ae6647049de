"""Tests that a leaf reaches the graph however its parameter is read, against the dense sum in float64."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from adapeft import attach, delta, detach
from adapeft.parts.elements import Elements
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import densify, gather
from tests.support.tiny import make_gpt2


class ReadByParent(nn.Module):
    """DeBERTa's position table, a mixer's projection, a convolution's taps, and a bias alone."""

    def __init__(self):
        super().__init__()
        self.table, self.projection = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.taps, self.norm = nn.Conv1d(4, 4, 3, groups=4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.projection.weight) + self.projection.bias * self.norm.weight
        x = x + torch.einsum("bsi,ci->bs", x, self.table.weight).unsqueeze(-1) * self.norm.bias
        return F.conv1d(x.transpose(1, 2), self.taps.weight, self.taps.bias, groups=4)


class ReadAndCalled(nn.Module):
    """Embedding and head that share one weight, which the last line reads a third time."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh()) @ self.embedding.weight.T


class Lists(nn.Module):
    """Axial positions in a list, and others in a dictionary."""

    def __init__(self):
        super().__init__()
        self.axes = nn.ParameterList([torch.randn(5, 1), torch.randn(1, 4)])
        self.named = nn.ParameterDict({"scale": torch.randn(4)})

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.axes[0] * self.axes[1]) * self.named["scale"]


class Attention(nn.Module):
    """``nn.MultiheadAttention`` reads its output projection and never calls it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(4, 3, batch_first=True, bidirectional=True), nn.GRU(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Normalized(nn.Module):
    """wav2vec 2.0's convolution with weight normalization, as a parametrization and in its older form."""

    def __init__(self):
        super().__init__()
        self.new = parametrizations.weight_norm(nn.Conv1d(4, 4, 3), dim=2)
        self.old = nn.utils.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.new(self.old(x).transpose(1, 2))


class Checkpointed(ReadByParent):
    """Module that is recomputed in the backward pass, after the forward of every module has returned."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class OtherForward(nn.Module):
    """Module whose forward is replaced on the instance, as by accelerate's hooks, and bound before ``attach``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        forward = self.layer.forward
        self.layer.forward = lambda x: forward(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


MODULES = (*(ReadByParent, ReadAndCalled, Lists, Attention, Recurrent, Normalized, Checkpointed, OtherForward),)
INPUT = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make(kind: type[nn.Module]) -> nn.Module:
    """Return the module in training mode with dropout off, so that no fast path bypasses the gradients."""
    torch.manual_seed(0)
    module = kind().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.train()


def part_of(parameter: Tensor, kind: str) -> Part:
    shape = tuple(parameter.shape)
    if kind == "rows":
        return Rows(shape, torch.arange(0, shape[0], 2))
    return Elements(shape, torch.arange(0, parameter.numel(), 3))


def attached(module: nn.Module, kind: str) -> dict[str, Part]:
    """Attach a part of every parameter; the leaves get values such as training would give them."""
    parts = {name: part_of(parameter, kind) for name, parameter in module.named_parameters()}
    attach(module, Subset(parts))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for leaf in attachment_of(module).trained.values():
            leaf.copy_(torch.randn(leaf.shape, generator=generator))
    return parts


def summed(base: nn.Module, module: nn.Module, parts: dict[str, Part]) -> nn.Module:
    with torch.no_grad():
        for name, part in parts.items():
            base.get_parameter(name).add_(densify(part, attachment_of(module).trained[name].double()))
    return base


def assert_equal(module: nn.Module, oracle: nn.Module, parts: dict[str, Part], run: Callable) -> None:
    """Check equality up to float32 rounding of the gradients: leaves are float32, and the sum is float64."""
    output, expected = run(module), run(oracle)
    torch.testing.assert_close(output, expected)
    for each in (output, expected):
        (each * torch.arange(1.0, each.numel() + 1).view(each.shape).sin()).sum().backward()
    for name, part in parts.items():
        leaf = attachment_of(module).trained[name]
        assert leaf.grad is not None, f"{name} is not in the graph"
        expected_gradient = gather(part, oracle.get_parameter(name).grad)
        torch.testing.assert_close(leaf.grad, expected_gradient.float())
        assert module.get_parameter(name).grad is None


@pytest.mark.parametrize("kind", ["rows", "elements"])
@pytest.mark.parametrize("module_class", MODULES)
def test_every_read_is_of_the_sum(module_class, kind):
    module = make(module_class)
    parts = attached(module, kind)
    oracle = summed(make(module_class), module, parts)
    assert_equal(module, oracle, parts, lambda m: m(INPUT))
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(INPUT), oracle.eval()(INPUT))


def test_a_recurrent_module_keeps_no_sum():
    module = make(Recurrent)
    attached(module, "rows")
    module(INPUT)
    assert all(isinstance(weight, nn.Parameter) for weight in module.lstm._flat_weights)
    other = copy.deepcopy(module)
    assert torch.equal(other(INPUT), module(INPUT))


def test_a_read_outside_of_any_forward():
    """A loss may compute logits itself, one block of the vocabulary at a time."""
    module = make(ReadAndCalled)
    parts = attached(module, "rows")
    oracle = summed(make(ReadAndCalled), module, parts)
    assert_equal(module, oracle, parts, lambda m: F.linear(INPUT, m.head.weight) * m.embedding.bias)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("options", [{}, {"scale_grad_by_freq": True}])
def test_embeddings_with_options(options, max_norm):
    tokens = torch.tensor([[0, 1, 1, 3], [2, 3, 3, 0]])

    def embedding() -> nn.Module:
        torch.manual_seed(0)
        return nn.Embedding(4, 3, max_norm=max_norm, **options).double()

    module = embedding()
    parts = attached(module, "rows")
    oracle = summed(embedding(), module, parts)
    assert_equal(module, oracle, parts, lambda m: m(tokens))


def test_get_parameter_and_state_dict_give_the_parameter_alone():
    module, base = make(ReadAndCalled), make(ReadAndCalled)
    attached(module, "rows")
    parameter = module.get_parameter("embedding.weight")
    assert isinstance(parameter, nn.Parameter)
    assert torch.equal(parameter, base.embedding.weight)
    assert parameter is module.get_parameter("head.weight")
    assert torch.equal(module.state_dict()["embedding.weight"], base.embedding.weight)
    assert not torch.equal(module.embedding.weight, base.embedding.weight)
    detach(module)
    assert torch.equal(module.embedding.weight, base.embedding.weight)


def make_deberta() -> DebertaV2ForSequenceClassification:
    torch.manual_seed(0)
    config = DebertaV2Config(
        **{"vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{"intermediate_size": 20, "max_position_embeddings": 16, "type_vocab_size": 0, "num_labels": 3},
        **{"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        **{"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_buckets": 4},
    )
    model = DebertaV2ForSequenceClassification(config).double().eval()
    model.config.architectures = ["DebertaV2ForSequenceClassification"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_deberta_trains_its_relative_positions(kind):
    model, ids = make_deberta(), torch.arange(3, 27).view(2, 12)
    parts = attached(model, kind)
    oracle = summed(make_deberta(), model, parts)
    assert_equal(model, oracle, parts, lambda m: m(input_ids=ids).logits)
    fresh = make_deberta()
    delta(model).apply(fresh)
    # A delta is float32 and adds in float32: a rounding of 6e-8 in each of a few hundred weights of about 0.2.
    torch.testing.assert_close(fresh(input_ids=ids).logits, oracle(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_a_copy_of_an_attached_model_is_one_of_its_own(copied, kind):
    model, ids = make_gpt2().eval(), torch.arange(1, 25).view(2, 12)
    attached(model, kind)
    other = copied(model)
    before = model(ids).logits
    assert torch.equal(other(ids).logits, before)
    assert other.get_parameter("lm_head.weight") is other.get_parameter("transformer.wte.weight")
    with torch.no_grad():
        for leaf in attachment_of(other).trained.values():
            leaf.mul_(-1)
    assert torch.equal(model(ids).logits, before), "the original is untouched"
    fresh = make_gpt2().eval()
    delta(other).apply(fresh)
    torch.testing.assert_close(fresh(ids).logits, other(ids).logits)
    detach(other)
    assert torch.equal(other(ids).logits, make_gpt2().eval()(ids).logits)
    assert [type(module) for module in other.modules()] == [type(module) for module in make_gpt2().modules()]
