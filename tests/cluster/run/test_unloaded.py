"""A choice without a loaded model is the one that is made with it."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5Model,
    XLNetConfig,
    XLNetModel,
)

from adapeft.config.config import Config
from adapeft.config.load import load_config
from adapeft.data.batches import draw_calibration
from adapeft.measure.groups import groups_of
from adapeft.measure.low_rank.seen import seen
from adapeft.measure.measure import measure
from adapeft.measure.mode import set_measuring_mode
from adapeft.measure.passes import Passes
from adapeft.measure.shards.shards import WholeModel
from adapeft.measure.statistics import Statistics
from adapeft.measure.storage import load_statistics
from adapeft.methods.registry import METHODS, get_method
from adapeft.ranks import OneRank
from adapeft.subset.subset import Subset
from cluster.ranks.choose import choose_and_save
from cluster.ranks.inputs import load_inputs
from cluster.run.session import Session
from cluster.run.unloaded import choose_unloaded
from cluster.terminal.console import Terminal
from tests.support.checkpoints import SPECIAL, WORDS, save_model, write_colours, write_config, write_text

VOCABULARY = len(SPECIAL) + len(WORDS)
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 48},
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
CLASSIFYING = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    # Its tables of masks and segments get no gradient from sentences without either.
    "xlnet": lambda: XLNetModel(XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24)),
    "t5": lambda: T5Model(T5Config(**T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3)),
}
WRITING = {
    # Its layers attend to an encoder that does not exist.
    "bert with cross-attention": lambda: BertLMHeadModel(
        BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    ),
    "gpt2, tied": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=2, eos_token_id=3)),
    # Stored with one tensor for each expert, and fused while it is loaded.
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3)),
}
SLOW = ("xlnet", "t5")
UNREACHED = {"xlnet": 5, "bert with cross-attention": 20}
UNMEASURED = sorted(name for name, method in METHODS.items() if not method.measures_loss)


def config_of(folder: Path, model: PreTrainedModel, task: str = "sequence-classification") -> Path:
    base = save_model(model, folder / "base")
    if task == "causal-lm":
        data = write_text(folder / "train.txt", 800), write_text(folder / "validation.txt", 200)
    else:
        data = write_colours(folder)
    return write_config(folder / "run.yaml", base, *data, task=task)


def loaded(config: Config) -> Statistics:
    """Return the statistics of a loaded model, as one process measures them."""
    inputs, settings = load_inputs(config), config.select
    method, model = get_method(settings.method), inputs.model()
    set_measuring_mode(model)
    groups = groups_of(model, settings)
    calibration = draw_calibration(len(inputs.train), settings.calibration, settings.batch_size, 1, config.seed)
    with seen(model, groups, method.window_rank(groups, settings), config.seed) as view:
        shards = view.shards(WholeModel(model, view.names, groups.always_train))
        passes = Passes(shards, inputs.objective, calibration, inputs.train.collate, config.seed)
        return measure(method, passes, groups, settings)


def chosen_both_ways(path: Path, tmp_path: Path, *overrides: str) -> tuple[Subset, Subset]:
    """Return the subsets that are chosen without a loaded model and with one, after comparing their statistics."""
    overrides = ("calibration=48", "budget=40%", *overrides)
    config = load_config(path, [*overrides, f"output={tmp_path / 'without'}"])
    with Session(config, Terminal()) as session:
        ours = choose_unloaded(session)
        contents = session.contents
    assert ours is not None
    statistics = loaded(config)
    found = load_statistics(tmp_path / "without")[0]
    assert found.groups == statistics.groups
    assert found.columns.keys() == statistics.columns.keys()
    for name, column in statistics.columns.items():
        assert np.array_equal(found.columns[name], column)
        if config.select.granularity == "element":
            for parameter in range(len(found.groups.parameters)):
                values = [part.values_of(parameter, itemgetter(name)) for part in (found, statistics)]
                assert torch.equal(*values)
    config = load_config(path, [*overrides, f"output={tmp_path / 'with'}"])
    num_examples = len(load_inputs(config).train)
    return ours, choose_and_save(config, contents, statistics, num_examples, OneRank(), None)


def check_equal(ours: Subset, theirs: Subset) -> None:
    described = [subset.choice.model_dump(exclude={"config", "solve_seconds"}) for subset in (ours, theirs)]
    assert described[0] == described[1]
    assert ours.choice.fingerprint
    assert ours.parts.keys() == theirs.parts.keys()
    for name, part in ours.parts.items():
        other = theirs.parts[name]
        assert part.describe() == other.describe()
        if part.num_indices:
            assert torch.equal(part.stored_indices, other.stored_indices)
    assert (ours.always_train, ours.new) == (theirs.always_train, theirs.new)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in (*CLASSIFYING, *WRITING)]
)
def test_it_is_the_choice_with_a_loaded_model(name, tmp_path):
    if name in WRITING:
        path = config_of(tmp_path, WRITING[name](), "causal-lm")
    else:
        path = config_of(tmp_path, CLASSIFYING[name]())
    ours, theirs = chosen_both_ways(path, tmp_path, "method=random", "groups=row")
    check_equal(ours, theirs)
    assert len(ours.choice.unreached or []) == UNREACHED.get(name, 0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return config_of(tmp_path_factory.mktemp("bert"), CLASSIFYING["bert"]())


QUICK = ("lora", "magnitude", "mixout", "random")


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method in QUICK else pytest.mark.slow) for method in UNMEASURED]
)
def test_every_method_that_measures_nothing(method, bert, tmp_path):
    check_equal(*chosen_both_ways(bert, tmp_path, f"method={method}"))


@pytest.mark.parametrize(
    ("groups", "dtype"),
    [
        *[("element", "float32"), ("row", "bfloat16"), ("tensor", "float32"), ("role", "bfloat16")],
        *[
            pytest.param(groups, dtype, marks=pytest.mark.slow)
            for groups, dtype in zip(("element", "row", "tensor", "role"), ("bfloat16", "float32") * 2, strict=True)
        ],
    ],
)
def test_weights_are_scored_as_they_are_loaded(groups, dtype, bert, tmp_path):
    check_equal(*chosen_both_ways(bert, tmp_path, "method=magnitude", f"groups={groups}", f"dtype={dtype}"))


def test_experts_are_scored_as_they_are_fused(tmp_path):
    path = config_of(tmp_path, WRITING["mixtral"](), "causal-lm")
    check_equal(*chosen_both_ways(path, tmp_path, "method=magnitude", "groups=element", "dtype=bfloat16"))


@pytest.fixture
def unloadable(monkeypatch):
    """Fail if weights are loaded or workers are started."""

    def must_not_be_called(*_, **__):
        raise AssertionError("loads the model or starts workers")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", must_not_be_called)
    monkeypatch.setattr(Session, "on_workers", must_not_be_called)


@pytest.mark.parametrize("select", [("method=lora", "budget=60%"), ("method=magnitude", "groups=element")])
def test_the_command_loads_nothing_and_starts_no_workers(command, bert, tmp_path, unloadable, select):
    done = command("select", bert, *select, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert Subset.load(tmp_path / "run" / "subset.safetensors").count


def needs_loading(config: Config, capsys) -> str:
    """Return the line that announces a choice with a loaded model; nothing is chosen before."""
    with Session(config, Terminal()) as session:
        assert choose_unloaded(session) is None
        assert not session.folder.subset.exists()
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("random chooses with the model loaded in every worker: ")
    return line


NEEDING = {
    "pickled": "torch before 1.6 has pickled its weights",
    "incomplete": "the checkpoint has no 'bert.embeddings.word_embeddings.weight'",
    "another shape": "the checkpoint has another shape of 'bert.embeddings.word_embeddings.weight'",
}


@pytest.mark.parametrize("damage", NEEDING)
def test_what_only_loading_shows_is_left_to_workers(damage, tmp_path, capsys):
    path = config_of(tmp_path, CLASSIFYING["bert"]())
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    if damage == "pickled":
        torch.save(tensors, tmp_path / "base" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        embeddings = tensors.pop("embeddings.word_embeddings.weight")
        if damage == "another shape":
            tensors["embeddings.word_embeddings.weight"] = embeddings[:-1].clone()
        save_file(tensors, weights, metadata={"format": "pt"})
    assert NEEDING[damage] in needs_loading(load_config(path, ["method=random"]), capsys)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_base_is_left_to_workers(quantization, bert, capsys):
    config = load_config(bert, ["method=random", f"quantization={quantization}", "groups=row", "zero_stage=2"])
    assert needs_loading(config, capsys).endswith("the base is quantized")


def test_code_that_reads_its_weights_is_left_to_workers(bert, monkeypatch, capsys):
    forward = BertModel.forward

    def reading(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        assert torch.isfinite(output.pooler_output).all()
        return output

    monkeypatch.setattr(BertModel, "forward", reading)
    said = needs_loading(load_config(bert, ["method=random"]), capsys)
    assert "it does not run without weights (aten._local_scalar_dense" in said
