"""Tests of every checkpoint form that transformers loads: a merged checkpoint loads as the applied model."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_utils import _get_resolved_checkpoint_files

from adapeft import AdapeftError, Delta, attach, delta, merge, save_for_peft
from adapeft.deltas.base import open_base
from adapeft.model.checkpoint.checkpoint import LoadedCheckpoint
from adapeft.model.checkpoint.files import weight_files
from adapeft.model.structure import describe_parameters
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.oracles.leaves import logits
from tests.oracles.merged import CLASSIFIER, LANGUAGE, random_delta
from tests.support.tiny import make_bert, make_gpt2

EMBEDDING = "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def make_llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=29, intermediate_size=19, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config)


def make_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=29, intermediate_size=20, **sizes, **experts))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Replace the tensors in the single weights file of a folder."""
    file = folder / SINGLE
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, {"format": "pt"})
    return folder


def saved(model: PreTrainedModel, folder: Path, **options: str) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def another_head(folder: Path, key: str, head: str = "lm_head.weight") -> Path:
    """Store a head with other values next to the embedding that the config ties to it."""
    generator = torch.Generator().manual_seed(3)
    return rewrite(folder, lambda t: {**t, head: t[key] + torch.randn(t[key].shape, generator=generator)})


def stale_index(folder: Path) -> Path:
    saved(make_llama(), folder, max_shard_size="6KB")
    newer = make_llama()
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.mul_(1.5)
    saved(newer, folder / "newer")
    shutil.move(folder / "newer" / SINGLE, folder / SINGLE)
    return folder


def pickled(folder: Path, *, sharded: bool = False) -> Path:
    tensors = load_file(saved(make_llama(), folder) / SINGLE)
    (folder / SINGLE).unlink()
    names = ["pytorch_model.bin"]
    if sharded:
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        weight_map = {key: names[number % 2] for number, key in enumerate(tensors)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for number, name in enumerate(names):
        torch.save(dict(list(tensors.items())[number :: len(names)]), folder / name)
    return folder


def fused_experts(folder: Path) -> Path:
    """Store the experts of a mixture fused, as the model holds them."""
    model = make_mixtral()
    saved(model, folder)
    return rewrite(folder, lambda _: {name: value.clone() for name, value in model.state_dict().items()})


def named_file(folder: Path) -> Path:
    saved(make_llama(), folder)
    (folder / SINGLE).rename(folder / "weights.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "weights.safetensors"}))
    return folder


def doubly_stored(folder: Path) -> Path:
    return rewrite(saved(make_gpt2(), folder), lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()})


def second_name_alone(folder: Path) -> Path:
    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {("lm_head.weight" if "embed_tokens" in key else key): value for key, value in tensors.items()}

    return rewrite(saved(make_llama(tied=True), folder), rename)


def older_spelling(folder: Path) -> Path:
    def rename(key: str) -> str:
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    model = make_bert()
    model.config.architectures = ["BertForSequenceClassification"]
    return rewrite(saved(model, folder), lambda t: {rename(key): value for key, value in t.items()})


def without_prefix(folder: Path) -> Path:
    masks = {f"h.{i}.attn.bias": torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16) for i in range(2)}
    return rewrite(
        saved(make_gpt2(), folder), lambda t: {**{k.removeprefix("transformer."): v for k, v in t.items()}, **masks}
    )


BASES: dict[str, Callable[[Path], Path]] = {
    "another head, gpt2": lambda folder: another_head(saved(make_gpt2(), folder), "transformer.wte.weight"),
    "another head, llama": lambda folder: another_head(saved(make_llama(tied=True), folder), EMBEDDING),
    "stale index": stale_index,
    "pickled": pickled,
    "pickled shards": lambda folder: pickled(folder, sharded=True),
    "experts apart": lambda folder: saved(make_mixtral(), folder),
    "experts apart in shards": lambda folder: saved(make_mixtral(), folder, max_shard_size="6KB"),
    "experts fused": fused_experts,
    "a file named by the config": named_file,
    "a tied weight stored twice": doubly_stored,
    "a tied weight under its second name": second_name_alone,
    "gamma and beta": older_spelling,
    "without prefix, with masks": without_prefix,
}  # fmt: skip


def load(folder: Path) -> PreTrainedModel:
    is_bert = json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    return (AutoModelForSequenceClassification if is_bert else AutoModelForCausalLM).from_pretrained(folder)


def delta_of(model: PreTrainedModel) -> Delta:
    """Return a delta with rows of all matrices and everything else whole, as the model holds them in memory."""
    parts = {}
    for info in describe_parameters(model):
        rows = torch.arange(1, info.shape[info.output_dim or 0], 3)
        parts[info.name] = Rows(info.shape, rows, info.output_dim) if info.output_dim is not None else Whole(info.shape)
    return random_delta(model, parts)


@pytest.mark.parametrize("kind", BASES)
def test_merged_loads_as_what_was_applied(kind, tmp_path):
    base = BASES[kind](tmp_path / "base")
    model = load(base)
    before, found = logits(model), delta_of(model)
    found.apply(model)
    expected = logits(model)
    assert (expected - before).abs().max() > 1e-2
    merge(found, str(base), tmp_path / "out")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in loaded.named_parameters()} == shapes
    if "classifier.weight" not in shapes:
        assert loaded.config.tie_word_embeddings == ("lm_head.weight" not in shapes)


@pytest.mark.parametrize("kind", ["another head, llama", "pickled", "experts apart", "stale index"])
def test_export_for_peft(kind, tmp_path):
    base = BASES[kind](tmp_path / "base")
    model = load(base)
    names = [name for name, _ in model.named_parameters() if "q_proj" in name or "norm.weight" in name]
    found = random_delta(model, {name: delta_of(model).changes[name].part for name in names})
    (folder,) = save_for_peft(found, str(base), tmp_path / "peft")
    loaded = PeftModel.from_pretrained(load(base), folder)
    found.apply(model)
    torch.testing.assert_close(logits(loaded.base_model.model), logits(model), rtol=1e-5, atol=1e-5)


def test_a_mixture_is_stored_as_it_was(tmp_path):
    base = BASES["experts apart"](tmp_path / "base")
    merge(delta_of(load(base)), str(base), tmp_path / "out")
    assert load_file(tmp_path / "out" / SINGLE).keys() == load_file(base / SINGLE).keys()


def test_whole_models_are_loaded_only_where_transformers_converts(tmp_path):
    whole = {"pickled", "pickled shards", "experts apart", "experts apart in shards"}
    for number, (kind, make) in enumerate(BASES.items()):
        task = CLASSIFIER if kind == "gamma and beta" else LANGUAGE
        found = open_base(str(make(tmp_path / str(number))), task["task"], task["labels"])
        assert isinstance(found.checkpoint, LoadedCheckpoint) == (kind in whole), kind


def test_files_are_taken_in_the_order_of_transformers(tmp_path):
    names = [SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"]
    shards = {"a.safetensors", "b.safetensors"}
    for count in range(1, 5):
        for number, chosen in enumerate(itertools.combinations(names, count)):
            folder = tmp_path / f"{count}-{number}"
            folder.mkdir()
            for name in [*chosen, *shards]:
                content = json.dumps({"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
                (folder / name).write_text(content if name.endswith("json") else "")
            expected, _ = _get_resolved_checkpoint_files(str(folder), None, None, None, {}, is_remote_code=False)
            assert weight_files(folder, "base") == sorted(map(Path, expected))


# --- refusals --------------------------------------------------------------------------------------------------------


def untied_without_head(folder: Path) -> Path:
    saved(make_llama(tied=True), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def prefixed(folder: Path) -> Path:
    return rewrite(saved(make_llama(), folder), lambda t: {f"module.{key}": value for key, value in t.items()})


def variant(folder: Path) -> Path:
    return saved(make_llama(), folder, variant="fp16")


def adapter_alone(folder: Path) -> Path:
    saved(make_llama(), folder)
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    return folder


def without_a_shard(folder: Path) -> Path:
    saved(make_llama(), folder, max_shard_size="6KB")
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    return folder


def wider(folder: Path) -> Path:
    saved(make_llama(), folder)
    return rewrite(folder, lambda t: {**t, "lm_head.weight": torch.zeros(31, 12)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (untied_without_head, r"no 'lm_head.weight', and config.json has tie_word_embeddings = false"),
        (
            prefixed,
            r"no 'lm_head.weight' \(and 20 more\): its names begin with 'module.', like those of a wrapped model",
        ),
        (variant, r"no model.safetensors or pytorch_model.bin, only 'model.fp16.safetensors'.*variant=…"),
        (adapter_alone, r"the folder has a PEFT adapter, not a base model"),
        (without_a_shard, r"model.safetensors.index.json names 'model-00001-of-\d+.safetensors', which is missing"),
        (wider, r"'lm_head.weight' has shape \(31, 12\) in the base checkpoint, but \(29, 12\) in the model"),
    ],
)
def test_a_refusal_names_the_cause(make, message, tmp_path):
    base = make(tmp_path / "base")
    model = make_llama()
    model.config.architectures = ["LlamaForCausalLM"]
    found = random_delta(model, {"model.norm.weight": Whole((12,))})
    with pytest.raises(AdapeftError, match=message):
        merge(found, str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trains_embedding", [False, True])
def test_a_vocabulary_that_was_resized(trains_embedding, tmp_path):
    base = saved(make_llama(), tmp_path / "base")
    model = load(base)
    model.resize_token_embeddings(31, mean_resizing=False)
    saved(model, tmp_path / "resized")
    parts = {"model.norm.weight": Whole((12,))}
    if trains_embedding:
        parts[EMBEDDING] = Rows((31, 12), torch.tensor([2, 30]))
    attach(model, Subset(parts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    delta(model, {"model": LANGUAGE}).save(tmp_path / "delta")
    found = Delta.load(tmp_path / "delta")
    message = r"(embed_tokens|lm_head).weight'(,| of shape).*If the vocabulary was resized before training"
    with pytest.raises(AdapeftError, match=message):
        merge(found, str(base), tmp_path / "out")
    with pytest.raises(AdapeftError, match=message):
        found.apply(load(base))
    merge(found, str(tmp_path / "resized"), tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model))


def test_another_base_is_told_by_what_differs(tmp_path):
    model = make_llama()
    attach(model, Subset({"model.norm.weight": Whole((12,))}))
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    found = delta(model, {"model": LANGUAGE})
    other = make_llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    with pytest.raises(AdapeftError, match=r"They differ in 'lm_head.weight' of 21 parameters"):
        found.apply(other)
    with pytest.raises(AdapeftError, match=r"They differ in 'lm_head.weight' of 21 parameters"):
        merge(found, str(saved(other, tmp_path / "other")), tmp_path / "out")
    with pytest.raises(AdapeftError, match=r"That base lacks 1 parameters of this one, such as 'lm_head.weight'"):
        attached_tied().apply(make_llama())


def attached_tied() -> Delta:
    """Return a delta of a model whose head is tied to its embedding."""
    model = attach(make_llama(tied=True), Subset({"model.norm.weight": Whole((12,))}))
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    return delta(model)
