"""Tests of parameters that are not dense floats in memory: supported, left out by name, or refused by name."""

from __future__ import annotations

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

import adapeft
from adapeft import AdapeftError, Delta, attach, delta, select
from adapeft.measure.groups import build_groups
from adapeft.model.dense import obstacle
from adapeft.model.fingerprint import fingerprint_model
from adapeft.parts.change import Change
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.oracles.leaves import logits, train
from tests.support.tiny import make_batches, make_bert

WEIGHT = "bert.encoder.layer.0.intermediate.dense.weight"
NORM = "bert.encoder.layer.0.output.LayerNorm.weight"


def transposed(model):
    """Return the model with a matrix and its head stored column by column."""
    for name in (WEIGHT, "classifier.weight"):
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.t().contiguous().t()
        assert not parameter.is_contiguous()
    return model


@pytest.mark.parametrize("kind", ["elements", "rows", "tensor", "lora"])
def test_a_matrix_in_another_order_of_memory(kind, tmp_path):
    shape = tuple(make_bert().get_parameter(WEIGHT).shape)
    part = {
        "elements": Elements(shape, torch.tensor([3, 17, 40, 200])),
        "rows": Rows(shape, torch.tensor([1, 5, 18]), 0),
        "tensor": Whole(shape),
        "lora": Lora(shape, 0, 2, 3.0),
    }[kind]
    deltas = []
    for prepare in (lambda model: model, transposed):
        model = attach(prepare(make_bert()), Subset({WEIGHT: part}))
        train(model)
        delta(model).save(tmp_path / "delta.safetensors")
        deltas.append(Delta.load(tmp_path / "delta.safetensors"))
        base = prepare(make_bert())
        before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
        applied = deltas[-1].apply(base)
        torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)
        applied.revert()
        assert all(torch.equal(base.get_parameter(name), value) for name, value in before.items())
    change, other = (found.changes[WEIGHT].values for found in deltas)
    assert change.any()
    torch.testing.assert_close(other, change, rtol=1e-3, atol=1e-3 * float(change.abs().max()))


@pytest.mark.parametrize("groups", ["row", "element", "tensor"])
def test_measuring_reads_elements_in_their_own_order(groups):
    options = {
        "groups": groups,
        "include": [WEIGHT],
        "budget": 60 if groups != "tensor" else 228,
        "method": "magnitude",
    }
    if groups != "element":
        options["method"] = "fish" if groups == "row" else "adapeft"
    plain = select(make_bert(), make_batches(make_bert()), warmup_steps=4, **options)
    other = select(transposed(make_bert()), make_batches(make_bert()), warmup_steps=4, **options)
    assert repr(other.parts) == repr(plain.parts)


class Quantized(nn.Linear):
    """Linear layer of int8 weights with a scale, as in bitsandbytes and others; ``packed`` stores two per byte."""

    def __init__(self, layer: nn.Linear, packed: bool) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.scale = layer.weight.detach().abs().max() / 7
        codes = (layer.weight.detach() / self.scale).round().to(torch.int8)
        if packed:
            unsigned = (codes.flatten() + 8).to(torch.uint8)
            codes = (unsigned[0::2] * 16 + unsigned[1::2])[:, None]
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        codes = self.weight
        if codes.dtype == torch.uint8:
            codes = torch.stack([codes[:, 0] // 16, codes[:, 0] % 16], 1).to(torch.int8) - 8
        return F.linear(x, codes.float().view(self.out_features, self.in_features) * self.scale, self.bias)


def quantized(packed: bool):
    """Return a model with every matrix of the blocks quantized."""
    model = make_bert()
    for path, module in list(model.bert.encoder.named_modules()):
        if type(module) is nn.Linear:
            model.bert.encoder.set_submodule(path, Quantized(module, packed))
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"groups": "row"}, {"groups": "element"}, {"method": "random"}, {"method": "magnitude"}, {"groups": "tensor"}],
    ids=str,
)
def test_quantized_matrices_are_no_candidates_and_count_as_what_they_hold(packed, options):
    model, plain = quantized(packed), build_groups(make_bert(), "row")
    with pytest.warns(UserWarning, match=r"12 parameters cannot be .* left out.*query\.weight', which (holds|is a)"):
        subset = select(model, make_batches(model), budget="20%", warmup_steps=4, **options)
    assert not any("dense.weight" in name or "query.weight" in name for name in subset.parts if "encoder" in name)
    assert subset.choice.num_total == plain.num_total
    attach(model, subset)
    train(model)
    found, fresh = delta(model), quantized(packed)
    applied = found.apply(fresh)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)
    applied.revert()
    assert fingerprint_model(fresh) == fingerprint_model(quantized(packed))


@pytest.mark.parametrize("packed", [False, True])
def test_what_would_change_quantized_matrices_is_refused(packed):
    model = quantized(packed)
    shape = tuple(make_bert().get_parameter(WEIGHT).shape)
    lora = r"method = lora: .* 12 parameters such as 'bert.* without quantization"
    with pytest.warns(UserWarning, match="left out"), pytest.raises(AdapeftError, match=lora):
        select(model, make_batches(model), budget="20%", method="lora")
    with pytest.raises(AdapeftError, match=r"no candidates are left\. 1 parameters"):
        select(model, make_batches(model), budget="20%", include=[WEIGHT])
    for part in (
        Whole(shape),
        Rows(shape, torch.tensor([1]), 0),
        Lora(shape, 0, 2, 2.0),
    ):
        with pytest.raises(AdapeftError, match=rf"adapeft.attach: the parameter '{WEIGHT}' holds torch.u?int8"):
            attach(model, Subset({WEIGHT: part}))
    change = Change(Elements(shape, torch.tensor([3])), torch.ones(1))
    with pytest.raises(AdapeftError, match=rf"adapeft.Delta.apply: the parameter '{WEIGHT}' holds torch.u?int8"):
        Delta({WEIGHT: change}, {}, fingerprint_model(model)).apply(model)
    assert fingerprint_model(model) == fingerprint_model(quantized(packed))


class Wrapped(torch.Tensor):
    """Tensor subclass around another tensor, like torchao's quantized tensors."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, outer_size, outer_stride):
        return Wrapped(tensors["inner"])

    def dequantize(self):
        return self.inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default, f"{function} is not for packed elements"
        return return_and_correct_aliasing(function, args, kwargs, Wrapped(args[0].inner))


DENSE = torch.arange(1.0, 7).view(2, 3)
UNUSUAL = {
    "int64": (DENSE.long(), "holds torch.int64"),
    "bool": (DENSE > 2, "holds torch.bool"),
    "complex": (DENSE.to(torch.complex64), "holds torch.complex64"),
    "float8": (DENSE.to(torch.float8_e4m3fn), "holds torch.float8_e4m3fn"),
    "sparse": (DENSE.to_sparse(), "is sparse"),
    "csr": (DENSE.to_sparse_csr(), "is sparse"),
    "expanded": (DENSE[:1].expand(4, 3), "share memory"),
    "strided over itself": (torch.arange(6.0).as_strided((3, 3), (1, 1)), "share memory"),
    "subclass": (Wrapped(DENSE), "is a Wrapped"),
}


@pytest.mark.filterwarnings("ignore:.*Sparse")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_parameters_are_left_out_or_refused(kind):
    def with_one():
        model = make_bert()
        model.bert.extra = nn.Parameter(value, requires_grad=False)
        return model

    value, reason = UNUSUAL[kind]
    model, plain = with_one(), make_bert()
    assert reason in obstacle(model.bert.extra)
    with pytest.warns(UserWarning, match=rf"1 parameters cannot be .* left out.*'bert.extra', which .*{reason}"):
        groups = build_groups(model, "element")
    assert [info.name for info in groups.parameters] == [i.name for i in build_groups(plain, "element").parameters]
    norm = Subset({NORM: Whole((12,))})
    train(attach(model, norm))
    delta(model).apply(with_one())
    with pytest.raises(AdapeftError, match=rf"adapeft.attach: the parameter 'bert.extra' .*{reason}"):
        attach(with_one(), Subset({"bert.extra": Whole(tuple(value.shape))}))


@pytest.mark.parametrize("value", [torch.tensor(2.0), torch.empty(0), torch.empty(0, 3)], ids=lambda v: str(v.shape))
@pytest.mark.parametrize("groups", ["row", "element", "tensor"])
def test_scalars_and_empty_parameters(value, groups):
    def with_one():
        model = make_bert()
        model.bert.extra = nn.Parameter(value.clone())
        # 0 for an empty parameter, the value itself for a scalar
        model.bert.register_forward_hook(lambda bert, inputs, output: _scaled(output, bert.extra.sum()))
        return model

    model = with_one()
    subset = select(model, make_batches(model), budget=3000, groups=groups, joint=False, warmup_steps=4)
    attach(model, subset)
    train(model)
    fresh = with_one()
    delta(model).apply(fresh)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)


def _scaled(output, factor):
    output["pooler_output"] = output["pooler_output"] * (1 + factor)
    return output


def a_norm(model):
    return Subset({NORM: Whole((12,))}, (), ())


def a_delta(model):
    values = torch.ones(12)
    return Delta({NORM: Change(Whole((12,)), values)}, {}, fingerprint_model(make_bert(), ("classifier.weight",
                 "classifier.bias")))  # fmt: skip


def offloaded():
    return accelerate.cpu_offload(make_bert(), execution_device=torch.device("cpu"))


def partly_meta():
    model = make_bert()
    model.bert.pooler.to("meta")
    return model


def lazy():
    model = make_bert()
    model.bert.lazy = nn.LazyLinear(3)
    return model


def in_inference_mode():
    with torch.inference_mode():
        return make_bert()


def over_one_memory():
    model = make_bert()
    first, second = (model.bert.encoder.layer[i].output.dense.weight for i in (0, 1))
    second.data = first.data
    return model


def in_one_buffer(first, second):
    """Store query and key of the first layer as views of one matrix [24, 24]."""
    model, buffer = make_bert(), torch.linspace(-0.3, 0.3, 24 * 24).sin().view(24, 24)
    attention = model.bert.encoder.layer[0].attention.self
    attention.query.weight.data, attention.key.weight.data = buffer[first], buffer[second]
    return model


def rows_over_rows():
    return in_one_buffer((slice(0, 12), slice(0, 12)), (slice(11, 23), slice(11, 23)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (offloaded, r"'bert\.embeddings\.word_embeddings\.weight' is offloaded by accelerate"),
        (partly_meta, r"2 of 41 parameters are on the meta device .*'bert\.pooler\.dense\.weight'"),
        (lazy, r"'bert\.lazy\.weight' belongs to a lazy module and has no shape yet"),
        (in_inference_mode, r"'bert\.embeddings\.word_embeddings\.weight' was created in torch\.inference_mode"),
        (rows_over_rows, r"'bert\.encoder\.layer\.0\.attention\.self\.query\.weight' and .* share memory"),
        (over_one_memory, r"'bert\.encoder\.layer\.0\.output\.dense\.weight' and .* share memory"),
    ],
)
@pytest.mark.parametrize("call", ["select", "attach", "Delta.apply"])
def test_what_is_not_in_memory_of_its_own(make, said, call):
    model = make()
    act = {
        "select": lambda: select(model, make_batches(make_bert())),
        "attach": lambda: attach(model, a_norm(model)),
        "Delta.apply": lambda: a_delta(model).apply(model),
    }[call]
    with pytest.raises(AdapeftError, match=rf"adapeft\.{call}: .*{said}"):
        act()


@pytest.mark.parametrize(
    "columns", [(slice(0, 12), slice(12, 24)), (slice(0, 24, 2), slice(1, 24, 2))], ids=["beside", "between"]
)
def test_parts_of_one_matrix_that_share_no_element_are_parameters_of_their_own(columns):
    model = in_one_buffer(*((slice(0, 12), one) for one in columns))
    train(attach(model, select(model, make_batches(model), budget="20%", warmup_steps=4)))
    fresh = in_one_buffer(*((slice(0, 12), one) for one in columns))
    delta(model).apply(fresh)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)


def test_offloading_after_training_is_refused_by_delta():
    model = attach(make_bert(), a_norm(make_bert()))
    train(model)
    assert adapeft.delta(model).count == 12
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(AdapeftError, match=r"adapeft\.delta: .* is offloaded by accelerate"):
        adapeft.delta(model)


def test_measuring_turns_gradients_on_where_it_can():
    batches = make_batches(make_bert())
    expected = adapeft.select(make_bert(), batches, budget="5%", groups="tensor", warmup_steps=4)
    with torch.no_grad():
        found = adapeft.select(make_bert(), batches, budget="5%", groups="tensor", warmup_steps=4)
        assert not torch.is_grad_enabled()
    assert found.parts == expected.parts
    model = make_bert()
    with torch.inference_mode():
        for call in (lambda: adapeft.select(model, batches), lambda: adapeft.attach(model, expected)):
            with pytest.raises(AdapeftError, match=r"torch\.inference_mode\(\) is active, so there are no gradients"):
                call()
