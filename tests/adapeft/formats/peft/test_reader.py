"""PEFT adapters as deltas: the base with the delta has the outputs of PEFT; other adapters are rejected."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from adapeft import AdapeftError, Delta, merge
from adapeft.formats.peft.folder import save_for_peft
from adapeft.formats.peft.reader import load_from_peft
from adapeft.model.checkpoint import files
from adapeft.model.structure import describe_parameters
from adapeft.parts.lora import Lora
from tests.adapeft.formats.peft.test_folder import parts_of
from tests.adapeft.tune import test_architectures as architectures
from tests.oracles.leaves import changed, logits, weights
from tests.oracles.merged import CLASSIFIER, LANGUAGE, random_delta, save_base
from tests.oracles.parts import MODELS, make_llama
from tests.support.tiny import make_bert, make_gpt2

LINEAR = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "k_proj", "down_proj"]}
TASKS = {"bert": CLASSIFIER["task"], "gpt2": LANGUAGE["task"], "llama": LANGUAGE["task"]}
QUERY = "bert.encoder.layer.0.attention.self.query"


def save_adapter(model: nn.Module, folder: Path, **options: object) -> nn.Module:
    """Save a PEFT adapter with random values by PEFT itself; return the model with the adapter."""
    adapted = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(folder)
    return adapted


def check(make: Callable[[], nn.Module], tmp_path: Path, task: str, **options: object) -> Delta:
    """Import an adapter and compare the base with the delta, and a merged checkpoint, with PEFT; return the delta."""
    adapted = save_adapter(make(), tmp_path / "adapter", **options)
    base, model = save_base(make(), tmp_path / "base"), make()
    delta = load_from_peft(tmp_path / "adapter", base, task)
    delta.save(tmp_path / "delta")
    Delta.load(tmp_path / "delta").apply(model)
    expected = logits(adapted.base_model.model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (logits(make()) - expected).abs().max() > 0.01
    merge(delta, base, tmp_path / "merged")
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "merged")), logits(model))
    return delta


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 2, "lora_alpha": 5, "use_rslora": True},
        {"r": 2, "rank_pattern": {r".*\.0\..*": 3, "1.*": 4}, "alpha_pattern": {r".*\.1\..*": 7}},
        {"r": 40, "lora_alpha": 20},
    ],
    ids=["plain", "rslora", "patterns", "rank above the matrix"],
)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_peft(name, options, tmp_path):
    saved = ["classifier"] if name == "bert" else None
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    delta = check(
        MODELS[name], tmp_path, TASKS[name], target_modules=LINEAR[name], modules_to_save=saved, **options, **fan
    )
    kinds = {change.part.kind for change in delta.changes.values()}
    assert kinds == ({"tensor"} if options["r"] == 40 else {"lora"})
    assert set(delta.new) == ({"classifier.weight", "classifier.bias"} if saved else set())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_biases_saved_modules_and_tokens(name, tmp_path):
    norm, embedding = {"bert": ("LayerNorm", "word_embeddings"), "gpt2": ("ln_1", "wte")}[name]
    delta = check(
        MODELS[name],
        tmp_path,
        TASKS[name],
        target_modules=LINEAR[name],
        lora_bias=True,
        lora_alpha=3,
        modules_to_save=[norm, "classifier"],
        trainable_token_indices={embedding: [7, 2, 28]},
    )
    kinds = {key: change.part.kind for key, change in delta.changes.items()}
    assert kinds[next(key for key in kinds if norm in key)] == "tensor"
    assert kinds[next(key for key in kinds if key.endswith("0.intermediate.dense.bias" if name == "bert" else "0.mlp.c_fc.bias"))] == "tensor"  # fmt: skip  # noqa: E501
    assert kinds[next(key for key in kinds if embedding in key)] == "rows"


def test_lora_on_an_embedding(tmp_path):
    check(make_llama, tmp_path, "causal-lm", r=3, target_modules=["embed_tokens", "lm_head"])


def test_another_number_of_classes(tmp_path):
    def make():
        model = make_bert()
        model.classifier = nn.Linear(12, 5)
        model.config.num_labels = model.num_labels = 5
        return model

    base = save_base(make_bert(), tmp_path / "base")
    adapted = save_adapter(make(), tmp_path / "a", target_modules=["query"], modules_to_save=["classifier"])
    delta = load_from_peft(tmp_path / "a", base, "sequence-classification")
    assert delta.description["model"]["labels"] == {"num_labels": 5}
    model = make()
    delta.apply(model)
    torch.testing.assert_close(logits(model), logits(adapted.base_model.model))


def test_an_adapter_of_the_model_without_its_head(tmp_path):
    model = make_llama()
    save_adapter(model.model, tmp_path / "adapter", target_modules=["q_proj"])
    delta = load_from_peft(tmp_path / "adapter", save_base(make_llama(), tmp_path / "base"), "causal-lm")
    base = make_llama()
    delta.apply(base)
    torch.testing.assert_close(logits(base), logits(model))
    assert set(delta.changes) == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
    base = save_base(MODELS[name](), tmp_path / "base")
    infos = [info for info in describe_parameters(MODELS[name]()) if info.is_linear and info.layer >= 0]
    parts = {i.name: Lora(i.shape, i.output_dim, 1 + n % 5, 3.0) for n, i in enumerate(infos)}
    delta = random_delta(MODELS[name](), parts)
    (folder,) = save_for_peft(delta, base, tmp_path / "peft")
    back = load_from_peft(folder, base)
    # The export folds the scaling into B.
    expected = {key: replace(part, alpha=float(part.rank)) for key, part in parts.items()}
    assert {key: change.part for key, change in back.changes.items()} == expected
    for key, part in parts.items():
        ours, theirs = part.split(delta.changes[key].values), part.split(back.changes[key].values)
        assert torch.equal(theirs["lora_A"], ours["lora_A"])
        torch.testing.assert_close(theirs["lora_B"], ours["lora_B"] * (3.0 / part.rank), rtol=2**-22, atol=0)
    assert back.new.keys() == delta.new.keys()
    assert all(torch.equal(back.new[key], value) for key, value in delta.new.items())
    assert back.fingerprint == delta.fingerprint
    assert back.description["model"]["task"] == delta.description["model"]["task"]


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_in_other_parts(name, tmp_path):
    base, first, second = save_base(MODELS[name](), tmp_path / "base"), MODELS[name](), MODELS[name]()
    delta = random_delta(first, parts_of(first, "rows"))
    (folder,) = save_for_peft(delta, base, tmp_path / "peft")
    delta.apply(first)
    load_from_peft(folder, base).apply(second)
    for key, value in weights(first).items():
        torch.testing.assert_close(second.get_parameter(key), value, rtol=1e-6, atol=1e-6)


def adapter(tmp_path: Path, **options: object) -> tuple[Path, str]:
    """Save an adapter of the tiny BERT; return its folder and its base."""
    folder = tmp_path / "adapter"
    options = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"} | options
    save_adapter(make_bert(), folder, **options)
    return folder, save_base(make_bert(), tmp_path / "base")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora = True: has no counterpart in a delta"),
        ({"bias": "all"}, "bias = 'all': has no counterpart in a delta"),
        ({"target_parameters": ["intermediate.dense.weight"]}, "target_parameters = "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the weights of the base"),
        ({"modules_to_save": None, "task_type": None}, "task_type = None is not supported. Give --task sequence"),
        ({"task_type": "QUESTION_ANS"}, "task_type = 'QUESTION_ANS' is not supported"),
    ],
)
def test_what_a_delta_has_not_is_refused_by_name(options, message, tmp_path):
    folder, base = adapter(tmp_path, **options)
    with pytest.raises(AdapeftError, match=message):
        load_from_peft(folder, base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 3}, rf"'{QUERY}' has a LoRA of rank 2, but 3 in adapter_config.json"),
        ({"lora_alpha": 0}, "has alpha 0, but alpha has to be"),
        ({"lora_alpha": "8"}, "has alpha '8', but alpha has to be"),
        ({"lora_alpha": float("inf")}, "has alpha inf"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern = \{'\(': 2\}: invalid patterns of layers"),
        ({"rank_pattern": [2]}, r"rank_pattern = \[2\]: invalid patterns of layers"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3': only LoRA can be imported. .* merge_and_unload"),
        ({"something_newer": {"on": True}}, r"something_newer = \{'on': True\}: has no counterpart in a delta"),
    ],
)
def test_a_config_that_does_not_go_with_the_tensors(change, message, tmp_path):
    folder, base = adapter(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapeftError, match=message):
        load_from_peft(folder, base)


LORA_A = f"base_model.model.{QUERY}.lora_A.weight"
HEAD = "base_model.model.classifier.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LORA_A: None}, f"'{QUERY}' has no lora_A"),
        ({LORA_A: torch.ones(2, 13)}, rf"LoRA on '{QUERY}.weight' adds 12 × 13 to a weight of shape \(12, 12\)"),
        ({LORA_A: torch.ones(2)}, "of the same rank"),
        ({HEAD: None}, "neither the adapter nor the base holds 'classifier.weight'"),
        ({HEAD: torch.ones(3, 13)}, r"'classifier.weight' has shape \(3, 13\), but \(3, 12\) in the base"),
        ({LORA_A.replace("layer.0", "layer.9"): torch.ones(2, 12)}, "'bert.encoder.layer.9.* has no lora_A"),
        ({"base_model.model.bert.pooler.x": torch.ones(2)}, "trains 'bert.pooler.x', which this base does not have"),
        ({LORA_A.replace("lora_A.", "lora_A.default."): torch.ones(2, 12)}, "has a tensor under two names"),
        (
            {LORA_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(12)},
            "belongs to a LoRA variant without counterpart",
        ),
        ({f"base_model.model.{QUERY}.base_layer.weight": torch.ones(12, 12)}, "is changed in two ways"),
        (
            {
                "base_model.model.bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta": torch.ones(
                    2, 12
                )
            },
            "trainable_token_indices does not list the indices of the 2 rows",
        ),
    ],
)
def test_tensors_that_do_not_go_with_the_base(change, message, tmp_path):
    folder, base = adapter(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapeftError, match=message):
        load_from_peft(folder, base)


def test_what_the_base_ties_and_peft_parts(tmp_path):
    base = save_base(make_gpt2(), tmp_path / "base")
    for number, (options, message) in enumerate(
        [
            (
                {"target_modules": ["lm_head"]},
                "LoRA on 'transformer.wte.weight', which the base ties to 'lm_head.weight'",
            ),
            ({"target_modules": ["c_attn"], "modules_to_save": ["wte"]}, "transformer.wte.weight is saved alone"),
            (
                {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
                "lm_head.weight and transformer.wte.weight differ",
            ),
        ]
    ):
        save_adapter(make_gpt2(), tmp_path / str(number), task_type="CAUSAL_LM", **options)
        with pytest.raises(AdapeftError, match=message):
            load_from_peft(tmp_path / str(number), base)


def test_an_embedding_that_computes_in_its_own_way(tmp_path):
    def make():
        return architectures.make("opt")[0]

    base = save_base(make(), tmp_path / "base")
    options = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_positions": [3]}}
    save_adapter(make(), tmp_path / "tokens", task_type="CAUSAL_LM", **options)
    save_adapter(make(), tmp_path / "lora", task_type="CAUSAL_LM", target_modules=["embed_positions"])
    for folder, what in (("tokens", "tokens of"), ("lora", "LoRA on")):
        with pytest.raises(AdapeftError, match=f"{what} .* a parameter of OPTLearnedPositionalEmbedding"):
            load_from_peft(tmp_path / folder, base)


def test_files_that_are_not_there_or_not_safe(tmp_path):
    folder, base = adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(AdapeftError, match="truncated or not safetensors"):
        load_from_peft(folder, base)
    # The header claims more bytes than the file holds.
    path.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    with pytest.raises(AdapeftError, match="truncated or not safetensors"):
        load_from_peft(folder, base)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(AdapeftError, match=r"adapter_model.bin is a pickle, .* call save_pretrained"):
        load_from_peft(folder, base)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(AdapeftError, match="cannot be read"):
        load_from_peft(folder, base)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": []}')
    save_file({}, path)
    with pytest.raises(AdapeftError, match=r"task_type = \[\] is not supported"):
        load_from_peft(folder, base)
    with pytest.raises(AdapeftError, match=r"is not a model .*Give a folder with config.json"):
        load_from_peft(folder, str(tmp_path), "causal-lm")
    with pytest.raises(AdapeftError, match="Give the folder of a PEFT adapter"):
        load_from_peft(tmp_path / "nowhere", base)


def test_a_base_on_the_hub_at_a_revision(tmp_path, monkeypatch):
    """Of the base that was trained on, and not the newest."""
    folder, base = adapter(tmp_path, revision="v1.0")
    asked = []
    monkeypatch.setattr(
        files, "snapshot_download", lambda name, revision, **_: asked.append((name, revision)) or str(base)
    )
    found = [load_from_peft(folder, "org/base", revision=given) for given in (None, "v2.0")]
    assert set(asked[: len(asked) // 2]) == {("org/base", "v1.0")}
    assert set(asked[len(asked) // 2 :]) == {("org/base", "v2.0")}
    of_folder = load_from_peft(folder, base)
    assert found[0].fingerprint == of_folder.fingerprint
    with pytest.raises(AdapeftError, match=r"--revision v1\.0: --model '.*base' is a folder, which has none"):
        load_from_peft(folder, base, revision="v1.0")


def test_shira_is_refused(tmp_path):
    get_peft_model(make_bert(), ShiraConfig(r=1, target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapeftError, match="peft_type = 'SHIRA'"):
        load_from_peft(tmp_path / "adapter", save_base(make_bert(), tmp_path / "base"))


def test_the_base_is_left_alone(tmp_path):
    folder, base = adapter(tmp_path)
    delta, model = load_from_peft(folder, base), make_bert()
    before = weights(model)
    delta.apply(model).revert()
    assert not any(mask.any() for mask in changed(before, weights(model)).values())
