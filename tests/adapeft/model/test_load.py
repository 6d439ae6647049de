"""Tests of loading: every process gets the same new head, and missing weights are reported before the start."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTConfig
from transformers.utils import is_flash_attn_2_available

from adapeft import AdapeftError
from adapeft.data.description import DataDescription
from adapeft.measure.groups import build_groups
from adapeft.model.load import (
    build_structure,
    label_options,
    load_model,
    load_model_config,
    load_tokenizer,
    trained_head,
)
from adapeft.model.section import Model
from adapeft.model.structure import new_parameters
from adapeft.tasks.describe import describe
from adapeft.tasks.registry import TASKS
from adapeft.tasks.sequence_classification import ClassificationData
from tests.oracles.leaves import weights
from tests.support.tiny import VOCABULARY, make_bert, make_gpt2

CLASSES = DataDescription(9, 9, ("no", "perhaps", "yes"), problem_type="single_label_classification", num_labels=3)
TEXT = DataDescription(9, 9, None, problem_type=None, num_labels=0)
AUTO = ("auto",)


def save_tokenizer(folder: Path, **special: str) -> None:
    vocabulary = {f"t{index}": index for index in range(VOCABULARY - 1)} | {"<end>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture
def bert_folder(tmp_path) -> Path:
    """Save a checkpoint of the base model without head and prefix, as on the Hub."""
    make_bert().bert.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="t0")
    return tmp_path


@pytest.fixture
def gpt2_folder(tmp_path) -> Path:
    """Save a language model whose tokenizer and config define no padding."""
    make_gpt2().save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="<end>")
    return tmp_path


def load(folder: Path, seed: int = 0, always_train=AUTO, description=CLASSES, **options: object):
    model = Model(name=str(folder), **{"task": "sequence-classification", **options})
    return load_model(model, load_model_config(model, description, load_tokenizer(model)), seed, always_train)


@pytest.mark.parametrize("has_another_head", [False, True])
def test_the_structure_has_the_parameters_of_the_loaded_model(has_another_head, tmp_path):
    """The config ties the head to the embedding; the file may store another head."""
    make_gpt2().save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="<end>")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if has_another_head:
        save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1}, file, {"format": "pt"})
    model = Model(name=str(tmp_path), task="causal-lm")
    config = load_model_config(model, CLASSES, load_tokenizer(model))
    structure = build_structure(config, "causal-lm")
    loaded = load_model(model, config, 0, AUTO)
    names = [name for name, _ in loaded.named_parameters()]
    assert [name for name, _ in structure.named_parameters()] == names
    assert ("lm_head.weight" in names) == has_another_head != config.tie_word_embeddings


def test_the_new_head_depends_on_the_seed_alone(bert_folder):
    first = weights(load(bert_folder))
    torch.rand(5)
    second, third = weights(load(bert_folder)), weights(load(bert_folder, seed=1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert {name for name, value in first.items() if not torch.equal(value, third[name])} == {"classifier.weight"}
    base = weights(make_bert())
    assert all(torch.equal(value, base[name]) for name, value in first.items() if name.startswith("bert."))


def test_options_reach_the_model(bert_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of names that transformers is about to drop
        model = load(bert_folder, dtype="bfloat16", gradient_checkpointing=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.is_gradient_checkpointing
    assert not model.config.use_cache
    assert model.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
    assert model.config.label2id == {"no": 0, "perhaps": 1, "yes": 2}
    assert model.config.problem_type == "single_label_classification"


def test_parameters_that_would_stay_random_are_refused_unless_trained(bert_folder):
    file = bert_folder / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "pooler" not in key}, file, {"format": "pt"})
    with pytest.raises(AdapeftError, match=r"has no bert.pooler.dense.bias, bert.pooler.dense.weight.*frozen") as error:
        load(bert_folder)
    assert "select.always_train: [auto, bert.pooler.dense.bias, bert.pooler.dense.weight]" in str(error.value)
    patterns = ("auto", "*pooler*")
    first, second = (weights(load(bert_folder, always_train=patterns)) for _ in range(2))
    assert torch.equal(first["bert.pooler.dense.weight"], second["bert.pooler.dense.weight"])
    with pytest.raises(AdapeftError, match=r"has no classifier.bias"):
        load(bert_folder, always_train=("*pooler*",))


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "base_model.model.", "model.module."])
def test_a_checkpoint_of_a_wrapped_model_is_named_as_such(before, bert_folder):
    """Training the missing parameters, as elsewhere, would train from random weights."""
    for model in (make_bert(), make_bert().bert):
        file = bert_folder / "model.safetensors"
        save_file({before + key: value.clone() for key, value in model.state_dict().items()}, file, {"format": "pt"})
        with pytest.raises(AdapeftError, match=f"no 'bert.*: its names begin with '{before}', like those of a wrapped"):
            load(bert_folder)


def test_what_the_checkpoint_lacks_is_new_and_no_part_of_the_base(bert_folder):
    file = bert_folder / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "pooler" not in key}, file, {"format": "pt"})
    patterns = ("auto", "*pooler*")
    first, second = (load(bert_folder, always_train=patterns, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    pooler = {"bert.pooler.dense.bias", "bert.pooler.dense.weight"}
    assert pooler | {"classifier.bias", "classifier.weight"} == set(new_parameters(first))
    groups = [build_groups(model, "row", always_train=patterns) for model in (first, second)]
    assert groups[0].fingerprint == groups[1].fingerprint
    assert not pooler & {info.name for info in groups[0].parameters}


def test_a_classifier_of_gpt2_knows_its_padding(gpt2_folder):
    model = load(gpt2_folder)
    assert model.config.pad_token_id == VOCABULARY - 1
    ids = torch.tensor([[3, 4, 5], [6, VOCABULARY - 1, VOCABULARY - 1]])
    alone = model.eval()(input_ids=ids[1:, :1]).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=(ids < VOCABULARY - 1).long()).logits[1:], alone)


def test_padding_of_its_own_stays(bert_folder):
    assert load(bert_folder).config.pad_token_id == 0


def test_a_language_model_has_no_new_parameters(gpt2_folder):
    model = load(gpt2_folder, description=TEXT, task="causal-lm")
    base = weights(make_gpt2())
    assert all(torch.equal(value, base[name]) for name, value in weights(model).items())
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("num_labels", "is_regression", "message"),
    [(3, False, None), (2, False, "2 classes, but the head of model.name has 3 outputs"),
     (4, False, "4 classes, but the head of model.name has 3"),
     (1, True, "need a head of 1 output, but model.name has one of 3")],
)  # fmt: skip
def test_labels_are_held_against_a_trained_head(num_labels, is_regression, message, tmp_path):
    trained = make_bert()
    trained.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="t0")
    model = Model(name=str(tmp_path), task="sequence-classification")
    path = tmp_path / "a.jsonl"
    labels = [0.5, 1.5] if is_regression else range(num_labels)
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in labels))
    data, head = ClassificationData(train=str(path), evaluation=str(path), max_length=8), trained_head(model)
    if message is None:
        assert describe(TASKS[model.task], data, head).num_labels == num_labels
    else:
        with pytest.raises(AdapeftError, match=message):
            describe(TASKS[model.task], data, head)


def test_a_trained_head_is_kept(tmp_path):
    trained = make_bert()
    trained.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="t0")
    assert torch.equal(load(tmp_path).classifier.weight, trained.classifier.weight)


def test_label_options_of_targets_and_text():
    targets = DataDescription(9, 9, None, problem_type="regression", num_labels=1)
    assert label_options("sequence-classification", targets) == {"num_labels": 1, "problem_type": "regression"}
    assert label_options("causal-lm", TEXT) == {}


def test_the_structure_has_the_names_and_no_weights(bert_folder):
    model = load(bert_folder)
    structure = build_structure(model.config, "sequence-classification")
    shapes = {name: value.shape for name, value in structure.named_parameters()}
    assert shapes == {name: value.shape for name, value in model.named_parameters()}
    assert all(parameter.is_meta for parameter in structure.parameters())


def test_attention_is_computed_as_the_config_says_at_the_same_values(bert_folder):
    logits = {}
    tokens = torch.arange(12).reshape(2, 6)
    for asked, used in ((None, "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        loaded = load(bert_folder, attn_implementation=asked).eval()
        assert loaded.config._attn_implementation == used
        logits[asked] = loaded(input_ids=tokens).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"])


@pytest.mark.skipif(is_flash_attn_2_available(), reason="needs a machine without flash-attn")
def test_an_attention_that_is_not_installed_is_refused_before_weights(bert_folder):
    model = Model(name=str(bert_folder), task="sequence-classification", attn_implementation="flash_attention_2")
    config = load_model_config(model, CLASSES, load_tokenizer(model))
    with pytest.raises(AdapeftError, match=r"model.attn_implementation = flash_attention_2 is not available .*Leave"):
        build_structure(config, "sequence-classification")


def test_a_model_without_a_head_for_the_task_is_refused():
    with pytest.raises(AdapeftError, match=r"model.task = sequence-classification: transformers has no vit model"):
        build_structure(ViTConfig(attn_implementation="eager"), "sequence-classification")


def test_what_is_not_there_is_named(tmp_path):
    model = Model(name=str(tmp_path), task="causal-lm")
    with pytest.raises(AdapeftError, match=r"model.name = .*: its tokenizer cannot be loaded"):
        load_tokenizer(model)
    save_tokenizer(tmp_path, pad_token="t0")
    with pytest.raises(AdapeftError, match=r"model.name = .*: cannot be loaded"):
        load_model_config(model, TEXT, load_tokenizer(model))
