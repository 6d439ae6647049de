"""Tests that what ``save_pretrained`` of an attached model writes loads as trained, or is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import adapeft
from adapeft import AdapeftError
from adapeft.errors import RoundingWarning
from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.parts.rows import Rows
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.adapeft.tune.test_attach import make_mixtral
from tests.oracles.leaves import SUBSETS, changed, logits, make_subset, train, weights
from tests.oracles.parts import MODELS, make_llama, mixed_subset
from tests.support.tiny import make_bert
from tests.support.trainers import saving_trainer

KINDS = (*SUBSETS, "lora")


def subset_of(model: nn.Module, kind: str) -> Subset:
    return mixed_subset(model, adapters=False) if kind == "lora" else make_subset(model, kind)


def trained_model(name: str, kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = MODELS[name]().to(dtype)
    adapeft.attach(model, subset_of(model, kind))
    train(model)
    return model


def reloaded(folder: object, model: nn.Module) -> PreTrainedModel:
    """Load with from_pretrained of the base class, which must find every key and no other."""
    auto = AutoModelForSequenceClassification if hasattr(model, "classifier") else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return loaded


def applied(model: nn.Module, base: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base with the model's delta, and parameters trained whole exactly, as their difference is rounded."""
    found = adapeft.delta(model)
    found.apply(base)
    whole = [name for name, change in found.changes.items() if change.part.kind == "tensor"]
    return {**weights(base), **{name: model.get_parameter(name).detach() for name in whole}}


@pytest.mark.filterwarnings("ignore::adapeft.errors.RoundingWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_what_save_pretrained_writes_is_the_base_with_the_delta(name, kind, dtype, tmp_path):
    model = trained_model(name, kind, dtype)
    expected = applied(model, MODELS[name]().to(dtype))
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = reloaded(tmp_path, model)
    assert not any(mask.any() for mask in changed(expected, weights(loaded)).values()), "bit for bit"
    assert loaded.config.architectures == [type(MODELS[name]()).__name__]
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), "saving leaves the model as it is"


def test_what_bfloat16_rounds_away_is_said(tmp_path):
    name = "bert.pooler.dense.weight"
    model = adapeft.attach(make_bert().bfloat16(), Subset({name: Rows((12, 12), torch.tensor([3]))}))
    with torch.no_grad():
        attachment_of(model).trained[name].fill_(1e-6)
    with pytest.warns(RoundingWarning, match="of the delta's 12 entries are lost"):
        model.save_pretrained(tmp_path)


def test_a_model_of_its_own_inside_the_attached_one_is_written_trained_too(tmp_path):
    model = trained_model("bert", "row")
    expected = applied(model, make_bert())
    model.bert.save_pretrained(tmp_path)
    loaded = type(model.bert).from_pretrained(tmp_path)
    for name, value in weights(loaded).items():
        assert torch.equal(value, expected[f"bert.{name}"])


def test_copies_write_their_own_training_and_detached_models_the_base(tmp_path):
    model = trained_model("bert", "mixed")
    copied = copy.deepcopy(model)
    train(copied)
    copied.save_pretrained(tmp_path / "copy")
    expected = applied(copied, make_bert())
    assert not any(mask.any() for mask in changed(expected, weights(reloaded(tmp_path / "copy", model))).values())
    adapeft.detach(model)
    model.save_pretrained(tmp_path / "base")
    loaded = weights(reloaded(tmp_path / "base", model))
    assert all(torch.equal(loaded[name], value) for name, value in weights(make_bert()).items() if "class" not in name)
    assert "save_pretrained" not in vars(model)
    pickle.dumps(model)


def test_adapters_are_refused_with_the_call_to_use(tmp_path):
    model = adapeft.attach(make_bert(), mixed_subset(make_bert()))
    with pytest.raises(AdapeftError, match=r"an adapter follows 'bert.*adapeft\.delta\(model\)\.save"):
        model.save_pretrained(tmp_path / "out")
    trainer = saving_trainer(model, tmp_path / "out", 2)
    with pytest.raises(AdapeftError, match=r"call adapeft\.delta instead of save_model"):
        trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_trainers_save_model_writes_the_trained_model(tmp_path):
    model = trained_model("bert", "mixed")
    expected = applied(model, make_bert())
    saving_trainer(model, tmp_path, 2).save_model(tmp_path / "final")
    model.save_pretrained(tmp_path / "checkpoint-2")  # called by the user, so it is no checkpoint of the Trainer
    for folder in ("final", "checkpoint-2"):
        loaded = weights(reloaded(tmp_path / folder, model))
        assert not any(mask.any() for mask in changed(expected, loaded).values())


def test_a_merged_checkpoint_is_not_added_to_a_model_that_is_attached(tmp_path):
    model = trained_model("bert", "row")
    model.save_pretrained(tmp_path)
    merged = load_file(tmp_path / "model.safetensors")
    for strict in (False, True):
        with pytest.raises(AdapeftError, match="whose training would count twice"):
            model.load_state_dict(dict(merged), strict=strict)
    lora = trained_model("bert", "lora")
    with pytest.raises(AdapeftError, match="whose training would count twice"):
        lora.load_state_dict(dict(merged), strict=False)
    plain = make_bert()
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    trained = logits(model)
    base = {name: value for name, value in make_bert().state_dict().items() if "classifier" not in name}
    model.load_state_dict(base, strict=False)
    assert torch.equal(logits(model), trained), "the base's own weights change nothing"


def test_a_bias_with_a_leaf_in_a_layer_with_lora(tmp_path):
    layer = "model.layers.0.mlp.down_proj"
    bert = "bert.encoder.layer.0.attention.self.query"
    for make, parts in (
        (make_llama, {f"{layer}.weight": Lora((12, 19), 0, 2, 4.0)}),
        (
            make_bert,
            {
                f"{bert}.weight": Lora((12, 12), 0, 2, 4.0),
                f"{bert}.bias": Elements((12,), torch.tensor([1, 7])),
            },
        ),
    ):
        model = adapeft.attach(make(), Subset(parts))
        train(model)
        expected = applied(model, make())
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert not any(mask.any() for mask in changed(expected, weights(loaded)).values())


def test_a_state_dict_is_the_base_and_the_leaves_and_no_plain_model_takes_it(tmp_path):
    model = trained_model("bert", "row")
    save_model(model, str(tmp_path / "model.safetensors"))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for state in (load_file(tmp_path / "model.safetensors"), torch.load(tmp_path / "model.pt")):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            make_bert().load_state_dict(state)
        again = adapeft.attach(make_bert(), subset_of(make_bert(), "row"))
        again.load_state_dict(state)
        assert torch.equal(logits(again), logits(model))


def test_a_parameter_of_the_model_itself_and_experts_under_other_names_on_disk(tmp_path):
    """A mixture's first checkpoints name its experts separately."""
    torch.manual_seed(0)
    speech = Wav2Vec2Model(Wav2Vec2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4))  # fmt: skip
    mixture = make_mixtral()
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    shape = tuple(mixture.get_parameter(experts).shape)
    for model, subset in (
        (speech, Subset({"masked_spec_embed": Elements((12,), torch.tensor([1, 3]))})),
        (mixture, Subset({experts: Elements(shape, torch.arange(0, 800, 7))})),
    ):
        base = copy.deepcopy(model)
        adapeft.attach(model, subset)
        with torch.no_grad():
            for leaf in attachment_of(model).trained.values():
                leaf.normal_(generator=torch.Generator().manual_seed(1))
        expected = applied(model, base)
        model.save_pretrained(tmp_path)
        loaded = type(base).from_pretrained(tmp_path)
        assert not any(mask.any() for mask in changed(expected, weights(loaded)).values())
        assert loaded.config.architectures == [type(base).__name__]
