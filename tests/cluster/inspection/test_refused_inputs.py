"""Input that would crash a worker exits with status 2, the field and the remedy, before any worker starts."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from adapeft.config.load import load_config
from cluster.inspection.inspect import inspect
from cluster.terminal.console import Terminal
from tests.support.checkpoints import (
    save_model,
    write_bert,
    write_colours,
    write_config,
    write_gpt2,
    write_lines,
    write_text,
)


def refusal(command, *arguments):
    done = command(*arguments)
    assert done.returncode == 2, done
    return " ".join(done.stderr.split())


@pytest.fixture
def roberta(tmp_path):
    config = RobertaConfig(
        vocab_size=25,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    return write_config(
        tmp_path / "run.yaml", save_model(RobertaModel(config), tmp_path / "base"), *write_colours(tmp_path)
    )


def test_a_checkpoint_that_lacks_a_shard(command, tmp_path):
    base = write_bert(tmp_path / "base", max_shard_size="5KB")
    config = write_config(tmp_path / "run.yaml", base, *write_colours(tmp_path))
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.unlink()
    for name in ("run", "select", "estimate"):
        said = refusal(command, name, config)
        assert f"model.safetensors.index.json names {shard.name!r}, which is missing. Download the base again." in said


@pytest.mark.slow
def test_positions_with_an_offset(command, roberta):
    for name in ("run", "select", "estimate"):
        said = refusal(command, name, roberta, "max_length=33")
        assert "data.max_length = 33: the model has 32 positions. Lower it to that or less." in said
    assert command("estimate", roberta, "max_length=32").returncode == 0


def test_blocks_longer_than_the_positions(command, tmp_path):
    train, evaluation = write_text(tmp_path / "train.txt", 1600), write_text(tmp_path / "validation.txt", 330)
    config = write_config(tmp_path / "run.yaml", write_gpt2(tmp_path / "base"), train, evaluation, task="causal-lm")
    said = refusal(command, "run", config, "max_length=33")
    assert "data.max_length = 33: the model has 32 positions" in said


@pytest.mark.slow
def test_answers_longer_than_the_positions(command, tmp_path):
    """The prompts have at most 5 words and a token before them, and the model has 32 positions."""
    rows = [{"prompt": f"the sea is {colour}", "completion": "blue"} for colour in ("old", "new", "big")]
    data = write_lines(tmp_path / "rows.jsonl", [*rows, {**rows[0], "prompt": "it is on the leaf"}])
    config = write_config(tmp_path / "run.yaml", write_gpt2(tmp_path / "base"), data, data, task="instruct")
    said = refusal(command, "run", config, "data.generate=all", "max_new_tokens=28")
    assert "data.max_new_tokens = 28: with the longest prompt, of 6 tokens, an answer may need 34 positions" in said
    assert "the model has 32. Lower data.max_new_tokens, or data.max_length to leave out longer prompts." in said
    options = ("groups=tensor", "calibration=4", "workers=1")
    assert command("estimate", config, "data.generate=all", "max_new_tokens=26", *options).returncode == 0


def test_a_metric_of_answers_needs_answers(command, tmp_path):
    data = write_lines(tmp_path / "rows.jsonl", [{"prompt": "the sea", "completion": "blue"}])
    config = write_config(tmp_path / "run.yaml", write_gpt2(tmp_path / "base"), data, data, task="instruct")
    said = refusal(command, "run", config, "data.metric=bleu")
    assert "metric: bleu compares generated answers; set data.generate, the number of examples to answer" in said


def test_a_tokenizer_larger_than_the_model(command, tmp_path):
    """Refused only if the data uses a token that the model lacks; unused tokens are allowed."""
    base = write_bert(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["violet"])
    tokenizer.save_pretrained(base)
    train, evaluation = write_colours(tmp_path)
    config = write_config(tmp_path / "run.yaml", base, train, evaluation)
    inspect(load_config(config))
    with evaluation.open("a") as file:
        file.write(json.dumps({"text": "the violet sea", "label": "blue"}) + "\n")
    said = refusal(command, "run", config)
    assert "data.evaluation: the tokenizer of model.name maps 'violet' to id 25, but the model has 25 embedd" in said
    assert "resize_token_embeddings(26)" in said


def test_relative_positions_have_no_limit_and_are_remarked(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base = save_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=25, max_position_embeddings=32, **size)), tmp_path / "base"
    )
    train, evaluation = write_text(tmp_path / "train.txt", 1600), write_text(tmp_path / "validation.txt", 330)
    path = write_config(tmp_path / "run.yaml", base, train, evaluation, task="causal-lm")
    remarks = []
    for length in (32, 33):
        config = load_config(path, [f"max_length={length}"])
        written = io.StringIO()
        Terminal(Console(file=written, width=200)).show_inputs(config, inspect(config))
        remarks.append("data.max_length = 33 exceeds the 32 that the model was trained with" in written.getvalue())
    assert remarks == [False, True]


def test_a_new_head_that_servers_do_not_load(command, config):
    said = refusal(command, "run", config, "select.servable=true")
    assert "select.servable = true: 2 parameters such as 'classifier.bias' are new" in said


def test_masked_words_for_an_encoder_decoder(command, tmp_path):
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    base = save_model(BartForConditionalGeneration(BartConfig(vocab_size=26, **sizes, **layers)), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(base)
    text = write_text(tmp_path / "text.txt", 1600)
    said = refusal(command, "run", write_config(tmp_path / "run.yaml", base, text, text, task="masked-lm"))
    assert f"model.task = masked-lm: '{base}' is an encoder-decoder, whose decoder reads the text" in said


def test_8_bit_weights_are_not_divided(command, config):
    said = refusal(command, "run", config, "quantization=int8", "groups=row", "rank=4")
    assert "cluster.zero_stage = 3: the base is quantized to int8" in said
    assert "Set cluster.zero_stage: 2, or model.quantization: nf4." in said


@pytest.mark.slow
def test_8_bit_weights_are_estimated_below_stage_3(command, config):
    assert command("estimate", config, "quantization=int8", "select.rank=4", "zero_stage=2").returncode == 0


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_are_not_offloaded(command, config, quantization):
    said = refusal(command, "run", config, f"quantization={quantization}", "rank=4", "workers=1", "offload=cpu")
    assert f"cluster.offload = cpu: the base is quantized ({quantization}), and its codes stay on the device" in said


@pytest.mark.parametrize("select", ["method=full", "groups=tensor", "method=mixout"])
def test_a_quantized_base_is_not_trained_whole(command, config, select):
    said = refusal(command, "run", config, "quantization=nf4", select)
    assert "trains matrices whole, but 13 candidates such as 'bert.encoder.layer.0" in said
    assert "are quantized (nf4)" in said


def test_validate_needs_gradients_of_elements(command, config):
    said = refusal(command, "validate", config, "quantization=nf4", "groups=row", "zero_stage=0")
    assert "is quantized: validate compares estimators that need the gradients of single elements" in said


def test_an_unknown_quantization(command, config):
    assert "model.quantization = int4: should be 'none', 'int8' or 'nf4'" in refusal(
        command, "run", config, "quantization=int4"
    )


def test_a_rate_of_a_head_where_there_is_none(command, tmp_path):
    data = tmp_path / "data.txt"
    write_text(data, 400)
    config = write_config(tmp_path / "run.yaml", write_gpt2(tmp_path / "base"), data, data, task="causal-lm")
    said = refusal(command, "run", config, "head_learning_rate=1e-2")
    assert "train.head_learning_rate = 0.01: the base model has all parameters of this task" in said
    assert "so there is no new head. Leave it out." in said
