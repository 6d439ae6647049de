"""A model that is divided while it is loaded equals the whole one, and no rank ever holds all of it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import adapeft
from adapeft.config.load import load_config
from adapeft.model.fingerprint import fingerprint_model
from tests.on_ranks.division import mixed
from tests.support.checkpoints import save_model, vocabulary, write_config, write_text
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.ranks

WORKERS = 2


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("llama", "float32", "none"), marks=pytest.mark.slow),
        pytest.param(("llama", "bfloat16", "cpu"), marks=pytest.mark.slow),
        ("llama", "float32", "nvme"),
        ("mixture", "bfloat16", "none"),
        pytest.param(("mixture", "float32", "cpu"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def run(request, tmp_path_factory):
    """Config of a model in several shards, in another dtype than it is loaded in, and what each rank found."""
    folder = tmp_path_factory.mktemp("divided")
    kind, dtype, offload = request.param
    stored = torch.bfloat16 if dtype == "float32" else torch.float32
    base = save_model(make(kind).to(stored), folder / "base", max_shard_size="50KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    text = write_text(folder / "text.txt", 400)
    path = write_config(folder / "run.yaml", base, text, text, "causal-lm")
    overrides = [f"model.dtype={dtype}", f"cluster.offload={offload}"]
    if offload == "nvme":
        (folder / "drive").mkdir()
        overrides.append(f"cluster.offload_folder={folder / 'drive'}")
    run_on_ranks(WORKERS, "tests.on_ranks.division", path, *overrides)
    found = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(WORKERS)]
    return load_config(path, overrides), found


def make(kind):
    """Return a Llama, or a mixture of experts, which are stored apart and fused while they are loaded."""
    sizes = {"vocab_size": len(vocabulary()), "hidden_size": 32, "num_hidden_layers": 24, "num_attention_heads": 2}
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": False}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=64, **sizes, **tokens))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(intermediate_size=16, **sizes, **tokens, **experts))


def whole(config):
    return AutoModelForCausalLM.from_pretrained(config.model.name, dtype=getattr(torch, config.model.dtype))


def test_no_rank_holds_more_than_its_share_and_one_piece(run):
    config, found = run
    parameters = list(whole(config).parameters())
    total = sum(parameter.nbytes for parameter in parameters)
    # The largest tensor as it is stored, its copy in the model's dtype and one to send; then what is not a weight.
    limit = total // WORKERS + 3 * 4 * max(parameter.numel() for parameter in parameters) + 32 * 1024
    assert limit < 0.75 * total
    for rank in found:
        assert total // WORKERS <= rank["loading"] < limit


def test_the_model_is_the_one_that_is_loaded_whole(run):
    config, found = run
    model = whole(config)
    for rank in found:
        assert rank["fingerprint"] == fingerprint_model(model)
        for of, tensors in (("values", model.named_parameters()), ("buffers", model.named_buffers())):
            expected = dict(tensors)
            assert rank[of].keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(rank[of][name], tensor), name


def test_whole_tensors_are_attached_extracted_and_added(run):
    config, found = run
    model = whole(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    subset = mixed(model)
    adapeft.attach(model, subset)
    for rank in found:
        assert rank["delta fingerprint"] == rank["fingerprint"]
        assert rank["offload"] == ("none" if config.cluster.offload == "none" else "cpu")
        frozen = before.keys() - {name for name, part in subset.parts.items() if part.trains_in_place}
        assert rank["mapped"] == (len(frozen) if config.cluster.offload == "nvme" else 0)
        assert rank["trained in"] == {getattr(torch, config.model.dtype)}  # leaves too, which start in float32
        assert rank["delta"].keys() == subset.parts.keys()
        for name, part in subset.parts.items():
            values = rank["delta"][name]
            if part.trains_in_place:
                # Adam's first step moves elements by the learning rate, except those with a tiny gradient; then decay.
                moved = (values + 0.1 * 0.5 * before[name].float()).abs()
                assert float((moved - 0.1).abs().quantile(0.9)) < 1e-4
                assert torch.equal(rank["tuned"][name], (before[name] + values).to(before[name].dtype))
        assert torch.equal(rank["logits"], rank["logits of the whole model"])
        for name, value in rank["tuned"].items():
            if name not in subset.parts:
                assert torch.equal(value, before[name]), name
