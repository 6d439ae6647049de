"""Inputs of every rank."""

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from adapeft.config.load import load_config
from adapeft.errors import AdapeftError
from adapeft.tasks.losses import pieces, split
from cluster.ranks.inputs import check_loss, load_inputs
from tests.support.checkpoints import WORDS, save_model, write_bert, write_colours, write_config, write_gpt2, write_text


def test_a_model_is_computed_in_the_precision_of_its_config(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    lowered = load_inputs(load_config(config, ["model.matmul_precision=medium"]))
    usual = load_inputs(load_config(config))
    try:
        lowered.model()
        assert torch.get_float32_matmul_precision() == "medium"
        usual.model()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_training_batches_are_of_one_length_if_the_config_says_so(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    usual = load_inputs(load_config(config, ["train.batch_size=4"]))
    grouped = load_inputs(load_config(config, ["train.batch_size=4", "train.train_sampling_strategy=group_by_length"]))
    lengths = np.array(grouped.train.lengths)
    assert lengths.tolist() == [len(row["input_ids"]) for row in grouped.train.rows]
    assert len(set(lengths)) > 1

    def padding(batches: tuple[np.ndarray, ...]) -> int:
        assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
        return sum(lengths[batch].max() * len(batch) for batch in batches) - lengths.sum()

    assert padding(grouped.training_batches(1)) < padding(usual.training_batches(1)) / 2


def test_the_loss_is_compared_with_the_models_own(tmp_path):
    """Also checks that the auxiliary loss of a mixture of experts, enabled by its config.json, is not part of ours."""
    text = write_text(tmp_path / "train.txt", 400)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    for adds_a_loss in (False, True):
        mixture = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=len(WORDS) + 4,
                intermediate_size=16,
                num_local_experts=2,
                output_router_logits=adds_a_loss,
                **sizes,
            )
        )
        base = save_model(mixture, tmp_path / f"base-{adds_a_loss}")
        config = load_config(write_config(tmp_path / "run.yaml", base, text, text, task="causal-lm"))
        inputs = load_inputs(config)
        model = inputs.model().eval()
        if adds_a_loss:
            with pytest.raises(AdapeftError, match=r"MixtralForCausalLM computes .*config\.output_router_logits"):
                check_loss(model, inputs, world_size=2)
        else:
            check_loss(model, inputs, world_size=2)


def test_a_model_whose_logits_cannot_be_split_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
    text = write_text(tmp_path / "train.txt", 400)
    inputs = load_inputs(
        load_config(write_config(tmp_path / "run.yaml", write_gpt2(tmp_path / "base"), text, text, task="causal-lm"))
    )
    events = []
    check_loss(inputs.model().eval(), inputs, 1, events.append)
    assert events == []
    monkeypatch.setattr(split, "_tried", lambda model: None)
    check_loss(inputs.model().eval(), inputs, 1, events.append)
    (event,) = events
    assert event["is_note"]
    assert "the model cannot be split after its body" in event["step"]
