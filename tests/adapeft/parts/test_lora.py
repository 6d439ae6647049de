"""Tests of LoRA with other parts: exact at the start, the base's names, small files, and bit-exact detaching."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

import adapeft
from adapeft import AdapeftError, Delta, attach, delta, detach, merge
from adapeft.config.load import parse_select
from adapeft.formats.peft.folder import save_for_peft
from adapeft.model.structure import describe_parameters
from adapeft.parts.adapter import Adapter
from adapeft.parts.lora import Lora
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.adapeft.deltas.test_merge import CLASSIFIER, LANGUAGE, save
from tests.oracles.leaves import changed, logits, train, weights
from tests.oracles.merged import save_base
from tests.oracles.parts import MODELS, low_rank_product, make_llama, mixed_subset
from tests.support.tiny import VOCABULARY, make_batches, make_bert, make_gpt2

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def trained(name: str, adapters: bool = True, **description: object) -> tuple[Delta, nn.Module]:
    model = MODELS[name]()
    attach(model, mixed_subset(model, adapters))
    train(model)
    return delta(model, description), model


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_subset_from_start_to_delta(name, tmp_path):
    model, base = MODELS[name](), MODELS[name]()
    subset, before = mixed_subset(model), logits(model)
    assert {part.kind for part in subset.parts.values()} == {"tensor", "rows", "elements", "lora", "adapter"}
    subset.save(tmp_path / "subset.safetensors")
    attach(model, Subset.load(tmp_path / "subset.safetensors"))
    assert torch.equal(logits(model), before), "B = 0"
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    new = sum(dict(base.named_parameters())[name].numel() for name in subset.new)
    assert sum(parameter.numel() for parameter in trainable) == subset.count + new
    assert {id(parameter) for parameter in trainable} == {id(p) for p in attachment_of(model).trained.values()}
    train(model)

    found = delta(model)
    found.save(tmp_path / "delta.safetensors")
    assert (tmp_path / "delta.safetensors").stat().st_size <= 8 * (subset.count + new) + 12_000
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert loaded.count == found.count == subset.count
    expected = weights(base)
    applied = loaded.apply(base)
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-4, atol=1e-5)
    for parameter, part in subset.parts.items():
        if part.kind == "lora":
            product = low_rank_product(part, found.changes[parameter].values)
            assert product.abs().max() > 1e-3
            summed = (expected[parameter].double() + product).float()
            torch.testing.assert_close(base.get_parameter(parameter), summed, rtol=1e-6, atol=1e-6)
    assert not any(mask.any() for n, mask in changed(expected, weights(base)).items()
                   if n not in (*subset.parts, *subset.new))  # fmt: skip
    applied.revert()
    assert weights(base).keys() == expected.keys()
    assert not any(mask.any() for mask in changed(expected, weights(base)).values())


@pytest.mark.parametrize("name", MODELS)
def test_detach_gives_the_base_back(name):
    _, model = trained(name)
    untouched = MODELS[name]()
    detach(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched.modules()]
    assert model.state_dict().keys() == untouched.state_dict().keys()
    assert vars(model).keys() == vars(untouched).keys()
    moved = {n for n, mask in changed(weights(untouched), weights(model)).items() if mask.any()}
    assert moved == set(mixed_subset(untouched).new)
    attach(model, mixed_subset(model))


def test_the_start_depends_on_seed_and_name_alone():
    part = Lora((12, 12), 0, 3, 3.0)
    other = QUERY.replace(".0.", ".1.")
    starts = []
    for seed, parts in ((1, {QUERY: part}), (1, {other: part, QUERY: part}), (2, {QUERY: part})):
        torch.manual_seed(len(starts))
        model = attach(make_bert(), Subset(parts, choice=Choice(seed=seed)))
        starts.append(attachment_of(model).added[QUERY]["lora_A"].detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert not torch.equal(attachment_of(attach(make_bert(), Subset({other: part}))).added[other]["lora_A"], starts[0])
    assert 0.5 / 12**0.5 < starts[0].abs().max() <= 1 / 12**0.5


def test_gradients_are_those_of_the_dense_sum():
    model = attach(make_gpt2(), mixed_subset(make_gpt2(), adapters=False))
    train(model)
    model.zero_grad()
    batch = make_batches(model)[0]
    model.eval()(**batch).loss.backward()
    oracle = make_gpt2().eval()
    delta(model).apply(oracle)
    oracle(**batch).loss.backward()
    for name, pieces in attachment_of(model).added.items():
        part = attachment_of(model).subset.parts[name]
        dense = oracle.get_parameter(name).grad
        dense = (dense if part.dim == 0 else dense.T) * part.alpha / part.rank
        torch.testing.assert_close(pieces["lora_A"].grad, pieces["lora_B"].T @ dense, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(pieces["lora_B"].grad, dense @ pieces["lora_A"].T, rtol=1e-3, atol=1e-5)


def test_float32_over_a_bfloat16_base():
    model, base = make_bert().bfloat16(), make_bert().bfloat16()
    subset, before = mixed_subset(model), logits(model)
    attach(model, subset)
    assert all(p.dtype == torch.float32 for pieces in attachment_of(model).added.values() for p in pieces.values())
    assert torch.equal(logits(model), before)
    train(model)
    expected = weights(base)
    applied = delta(model).apply(base)
    torch.testing.assert_close(logits(base), logits(model), rtol=3e-2, atol=5e-2)
    applied.revert()
    assert not any(mask.any() for mask in changed(expected, weights(base)).values())


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = attach(make_bert(), mixed_subset(make_bert()))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        model.train()(**make_batches(model)[0]).loss.backward()
        grads.append([leaf.grad for leaf in attachment_of(model).trained.values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("name", "task"), [("bert", CLASSIFIER), ("gpt2", LANGUAGE), ("llama", LANGUAGE)])
def test_merging_into_a_checkpoint_is_applying(name, task, tmp_path):
    found, _ = trained(name, adapters=False, model=task)
    base = MODELS[name]()
    folder = save(base.bert if name == "bert" else base, tmp_path / "base", "one file" if name == "llama" else "shards")
    found.apply(base)
    merge(found, str(folder), tmp_path / "out")
    loaded = type(base).from_pretrained(tmp_path / "out")
    assert not any(mask.any() for mask in changed(weights(base), weights(loaded)).values())


@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_is_exported(name, tmp_path):
    model = MODELS[name]()
    whole = mixed_subset(model)
    parts = {key: part for key, part in whole.parts.items() if part.kind == "lora"}
    attach(model, Subset(parts, whole.always_train, whole.new))
    train(model)
    found = delta(model, {"model": CLASSIFIER if name == "bert" else LANGUAGE})
    save_for_peft(found, save_base(MODELS[name](), tmp_path / "base"), tmp_path / "peft")
    assert sorted(path.name for path in (tmp_path / "peft").glob("adapter_*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path / "peft")
    torch.testing.assert_close(logits(loaded.base_model.model), logits(model))
    assert not torch.allclose(logits(model), logits(MODELS[name]()))
    wrapped = [module for module in loaded.modules() if isinstance(module, LoraLayer)]
    assert len(wrapped) == len(parts)
    assert max(module.r["default"] for module in wrapped) == max(part.rank for part in parts.values())


@pytest.mark.parametrize(
    ("make", "name", "part", "message"),
    [
        (make_gpt2, "transformer.wte.weight", Lora((29, 12), 0, 1, 0.0), "a parameter of Embedding"),
        (make_bert, "bert.encoder.layer.0.output.LayerNorm.weight", Lora((12,), 0, 1, 0.0), "of LayerNorm"),
        (make_bert, QUERY, Lora((12, 12), 1, 1, 0.0), "in Linear they are along the other one"),
        (make_bert, QUERY, Lora((12, 12), 0, 1, 0.0), "rank 1 and alpha 0.0"),
        (make_bert, QUERY, Lora((12, 12), 0, 13, 1.0), "from 1 to the smaller side"),
    ],
)
def test_where_lora_cannot_be(make, name, part, message):
    model = make()
    before = [type(module) for module in model.modules()]
    with pytest.raises(AdapeftError, match=message):
        attach(model, Subset({name: part}))
    assert [type(module) for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_linear_layer_is_refused():
    model = make_llama()
    model.model.layers[0].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    with pytest.raises(AdapeftError, match="tied and used in several places"):
        attach(model, Subset({"model.layers.0.self_attn.q_proj.weight": Lora((12, 12), 0, 1, 1.0)}))


def test_a_layer_that_is_never_called_is_refused():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.MultiheadAttention(4, 2)])
    name = "blocks.0.out_proj.weight"
    assert not any(info.is_linear or info.output_of for info in describe_parameters(model))
    with pytest.raises(AdapeftError, match="LoRA needs the weight of a linear layer"):
        attach(model, Subset({name: Lora((4, 4), 0, 1, 1.0)}))
    with pytest.raises(AdapeftError, match="not a linear layer that this model calls"):
        attach(model, Subset({name.removesuffix(".weight"): Adapter((4,), 1)}))


def test_an_alpha_of_nothing_is_refused_when_loading(tmp_path):
    Subset({QUERY: Lora((12, 12), 0, 1, 0.0)}).save(tmp_path / "s")
    with pytest.raises(AdapeftError, match=r"has alpha 0\.0: it must be above 0"):
        Subset.load(tmp_path / "s")


@pytest.mark.parametrize("piece", ["lora_A", "lora_B"])
def test_a_damaged_delta_is_refused(piece, tmp_path):
    model = attach(make_bert(), Subset({QUERY: Lora((12, 12), 0, 2, 2.0)}))
    delta(model).save(tmp_path / "d")
    with safe_open(tmp_path / "d", framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert set(tensors) == {f"{QUERY}.lora_A", f"{QUERY}.lora_B", "base.digests"}
    cut = {key: value[:1].contiguous() if key.endswith(piece) else value for key, value in tensors.items()}
    save_file(cut, tmp_path / "d", metadata)
    with pytest.raises(AdapeftError, match=f"has {piece} of shape"):
        Delta.load(tmp_path / "d")
    save_file({key: value for key, value in tensors.items() if not key.endswith(piece)}, tmp_path / "d", metadata)
    with pytest.raises(AdapeftError, match="damaged description of a delta"):
        Delta.load(tmp_path / "d")


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, "has a LoRA of rank 0 .* from 1 to the smaller side"),
        (13, "has a LoRA of rank 13 .* from 1 to the smaller side"),
        (-1, "rank: Input should be greater than or equal to 0"),
    ],
)
def test_a_rank_that_does_not_fit_is_refused_when_loading(rank, said, tmp_path):
    Subset({QUERY: Lora((12, 12), 0, rank, 0.0)}).save(tmp_path / "s")
    with pytest.raises(AdapeftError, match=said):
        Subset.load(tmp_path / "s")


@pytest.mark.parametrize("name", MODELS)
def test_the_method_takes_the_largest_rank(name):
    model = MODELS[name]()
    layers = {i.name: i.shape for i in describe_parameters(model) if len(i.shape) == 2 and i.layer >= 0}
    per_rank = sum(map(sum, layers.values()))

    def choose(budget, **options):
        return adapeft.select(model, make_batches(model), method="lora", budget=budget, seed=3, **options)

    for budget, rank in ((per_rank, 1), (3 * per_rank - 1, 2), (3 * per_rank, 3)):
        subset = choose(budget)
        assert subset.parts.keys() == layers.keys()
        assert {(part.kind, part.rank, part.alpha) for part in subset.parts.values()} == {("lora", rank, float(rank))}
        assert subset.count == rank * per_rank
    drawn = choose(per_rank - 1)
    assert drawn.parts.keys() < layers.keys()
    assert {part.rank for part in drawn.parts.values()} == {1}
    smallest = min(map(sum, layers.values()))
    with pytest.raises(AdapeftError, match=f"on the smallest layer trains {smallest}. Raise the budget to {smallest},"):
        choose(smallest - 1)
    some = choose(per_rank - 1, include=["*.0.*"])
    assert all(".0." in parameter for parameter in some.parts)
    assert len(some.parts) == len(layers) / 2
    with pytest.raises(AdapeftError, match="no candidate is a linear layer of a block"):
        choose(12, include=["*norm*" if name == "llama" else "*bias"])


def test_the_rank_is_free_of_what_the_matrices_hold():
    model = make_bert()
    for budget, rank in ((31, 1), (311, 10), (10_000, 12)):  # 228 elements of 12 × 19, whose rank is at most 12
        (part,) = adapeft.select(
            model, make_batches(model), method="lora", budget=budget, include="*.0.output.dense.weight"
        ).parts.values()
        assert (part.shape, part.rank, part.count) == ((12, 19), rank, rank * 31)


def test_keys_of_other_methods_are_refused():
    with pytest.raises(AdapeftError, match=r"select\.groups = row: lora chooses by tensor"):
        parse_select({"method": "lora", "groups": "row"})


def moe(name):
    """Tiny mixtures of experts of transformers 5, whose experts are fused and whose configs PEFT rewrites."""
    sizes = dict(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    routed = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    shared = {"shared_expert_intermediate_size": 8}
    linear = {
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
    }
    hybrid = {"layer_types": ["linear_attention", "full_attention"]}
    torch.manual_seed(0)
    model = {
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=3)),
        "qwen2-moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **routed, **shared)),
        "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **routed)),
        "qwen3-next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **routed, **shared, **linear, **hybrid)),
        "deepseek-v3": lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **{**sizes, "num_key_value_heads": 2}, n_routed_experts=4, moe_intermediate_size=8, n_group=1,
                topk_group=1, num_experts_per_tok=2, q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=4,
                qk_nope_head_dim=4, v_head_dim=4, first_k_dense_replace=1,
            )
        ),
    }[name]()  # fmt: skip
    model.config.architectures = [type(model).__name__]
    model.config.use_cache = False
    return model.eval()


def everything_about(model):
    """Return the module graph: classes, names and their order, hooks, modes, attributes, and trainable parameters."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (
            path, id(module), type(module), module.training, sorted(vars(module)), list(module._modules),
            [(name, id(p), p is not None and p.requires_grad) for name, p in module._parameters.items()],
            list(module._buffers), [list(getattr(module, kind).values()) for kind in hooks],
        )
        for path, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("which", ["one layer", "all layers"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "qwen3-next", "deepseek-v3"])
def test_peft_wraps_what_was_asked_for_and_detach_undoes_exactly_that(name, which):
    model = moe(name)
    linear = [info for info in describe_parameters(model) if info.is_linear and info.layer >= 0]
    chosen = (
        linear if which == "all layers" else [i for i in linear if i.role.startswith("self_attn.") and i.layer == 1][:1]
    )
    subset = Subset({info.name: Lora(info.shape, 0, min(2, *info.shape), 3.0) for info in chosen})
    model.get_parameter(linear[0].name).requires_grad_(False)
    before, start = everything_about(model), logits(model)
    attach(model, subset)
    wrapped = {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert wrapped == {info.name.removesuffix(".weight") for info in chosen}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == subset.count
    train(model)
    fresh = moe(name)
    delta(model).apply(fresh)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-4)
    detach(model)
    assert everything_about(model) == before
    assert torch.equal(logits(model), start)


def test_what_peft_wraps_otherwise_is_an_error_and_undone(monkeypatch):
    """Simulates a PEFT version that changes a request: it gets another layer and another rank."""
    model = make_llama()
    first, second = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
    subset = Subset({f"{first}.weight": Lora((12, 12), 0, 2, 3.0)})
    before = everything_about(model)

    def widened(config, model, name, state_dict):
        config.rank_pattern = {}
        return inject_adapter_in_model(config, model, name, state_dict=state_dict | {f"{second}.lora_A.weight": None})

    monkeypatch.setattr("adapeft.parts.layers.lora.inject_adapter_in_model", widened)
    said = rf"but not requested: \['{second}\.weight'\].*not wrapped: none.*rank or scale: \['{first}\.weight'\]"
    with pytest.raises(AdapeftError, match=said):
        attach(model, subset)
    assert everything_about(model) == before


def test_what_peft_refuses_is_an_error_that_names_it():
    """The layer's weight is read directly by its parent, and the subset was made elsewhere."""
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).eval()
    model.config.architectures = ["MambaForCausalLM"]
    infos = {info.role: info for info in describe_parameters(model) if info.layer == 0}
    assert infos["mixer.in_proj.weight"].is_linear
    assert not any(infos[f"mixer.{name}.weight"].is_linear for name in ("x_proj", "dt_proj", "out_proj", "conv1d"))
    before = everything_about(model)
    out = infos["mixer.out_proj.weight"]
    with pytest.raises(AdapeftError, match=rf"LoRA on '{out.name}', .* fused kernels"):
        attach(model, Subset({out.name: Lora(out.shape, 0, 2, 2.0)}))
    with pytest.raises(AdapeftError, match=rf"adapter after '{out.name.removesuffix('.weight')}'"):
        attach(model, Subset({out.name.removesuffix(".weight"): Adapter((12,), 2)}))
    assert everything_about(model) == before
