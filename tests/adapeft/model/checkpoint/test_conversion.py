"""Tensors that transformers converts while it loads them are converted one at a time, to the same values."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import MergeModulelist

from adapeft.errors import AdapeftError
from adapeft.model.checkpoint.checkpoint import open_stored
from adapeft.model.load import load_model
from adapeft.model.unloaded.divided import load_divided
from adapeft.model.unloaded.unloaded import NeedsLoadingError, open_unloaded
from tests.adapeft.model.test_load import AUTO
from tests.adapeft.model.unloaded.test_divided import Recorded, opened
from tests.adapeft.tune.test_all_architectures import make
from tests.support.tiny import make_mixtral

QUICK = ("qwen3_moe", "gte")  # many to one, and one to many
DECODERS = (
    "afmoe axk1 bailing_hybrid cohere2_moe deepseek_v2 deepseek_v3 deepseek_v4 dots3_note_text ernie4_5_moe exaone_moe "
    "flex_olmo glm4_moe hrm_text hunyuan_v1_moe hy_v3 jamba kolibri1 laguna longcat_flash mellum minimax minimax_m2 "
    "mixtral olmo_hybrid olmoe phimoe qwen2_moe qwen3_moe qwen3_next solar_open"
)
CONVERTED = {
    **dict.fromkeys(DECODERS.split(), "decoder"),
    **dict.fromkeys(("gte", "jina_embeddings_v3", "nomic_bert"), "encoder"),
}


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in CONVERTED]
)
def test_they_are_those_of_the_loaded_model(family, tmp_path):
    model = make(CONVERTED[family], family).float()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    expected = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.device("meta"):
        structure = type(model)(expected.config)
    checkpoint = open_stored(tmp_path, str(tmp_path), structure, torch.bfloat16)
    assert checkpoint.obstacle is None
    assert not checkpoint.is_final
    found = dict(checkpoint.tensors())
    assert list(found) == checkpoint.order()
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name].bfloat16(), parameter.bfloat16()), name


def test_only_what_is_asked_for_is_converted(tmp_path, monkeypatch):
    section, config = mixture(tmp_path)
    checkpoint = open_unloaded(section, config, AUTO).checkpoint
    monkeypatch.setattr(MergeModulelist, "convert", None)
    assert checkpoint.read(["model.norm.weight"]).keys() == {"model.norm.weight"}


def test_an_operation_that_needs_values_is_left_to_transformers(tmp_path, monkeypatch):
    convert = MergeModulelist.convert

    def reading(self, input_dict, **options):
        assert all(tensor.isfinite().all() for tensors in input_dict.values() for tensor in tensors)
        return convert(self, input_dict, **options)

    section, config = mixture(tmp_path)
    monkeypatch.setattr(MergeModulelist, "convert", reading)
    with pytest.raises(NeedsLoadingError, match=r"cannot convert 'model\.layers\.\d\.mlp\.experts\.\w+' alone"):
        open_unloaded(section, config, AUTO)
    division = Recorded(reads=True)
    names = [name for name, _ in load_divided(section, config, 3, AUTO, division).named_parameters()]
    whole = dict(load_model(section, config, 3, AUTO).named_parameters())
    for name, value in zip(names, division.values, strict=True):
        assert torch.equal(value, whole[name]), name


def test_experts_that_are_stored_twice_are_left_to_transformers(tmp_path):
    model = make_mixtral()
    name = "model.layers.1.mlp.experts.down_proj"
    section, config = mixture(tmp_path, lambda tensors: {**tensors, name: model.state_dict()[name].clone()})
    with pytest.raises(NeedsLoadingError, match=f"several of its tensors are '{name}'"):
        open_unloaded(section, config, AUTO)


@pytest.mark.parametrize("missing", ["experts.2.w3", "experts.2.w2", ".w2.", ".w3.", "experts."])
def test_missing_experts_are_an_error(tmp_path, missing):
    section, config = mixture(
        tmp_path, lambda tensors: {key: value for key, value in tensors.items() if missing not in key}
    )
    with pytest.raises(NeedsLoadingError):
        open_unloaded(section, config, AUTO)
    with pytest.raises((AdapeftError, RuntimeError)) as expected:
        load_model(section, config, 3, AUTO)
    with pytest.raises(expected.type) as found:
        load_divided(section, config, 3, AUTO, Recorded(reads=True))
    assert str(found.value) == str(expected.value)


def mixture(folder, change=dict):
    """Return the section ``model`` and the config of a mixture of experts whose stored tensors are changed."""
    make_mixtral().save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return opened(folder, "causal-lm", "float32")
