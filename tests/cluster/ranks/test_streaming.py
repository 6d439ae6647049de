"""Training on a stream: the results of the whole data set, of any number of ranks, and of a resumed run."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import adapeft
from adapeft.config.load import load_config
from adapeft.data.batches import micro_batches
from cluster.events import ignore
from cluster.inspection.plan import plan_training
from cluster.ranks.inputs import count_examples, load_inputs
from tests.support.checkpoints import save_model, vocabulary, write_config, write_text
from tests.support.ranks import run_on_ranks
from tests.support.stages import TWELVE_STEPS

OVERRIDES = ["data.streaming=true", "groups=row", *TWELVE_STEPS]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return a config of a causal language model without dropout, on 75 blocks of text: ten steps are one pass."""
    folder, off = tmp_path_factory.mktemp("stream"), dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 3}
    base = save_model(GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary()), **sizes, **off)), folder / "base")
    train, evaluation = write_text(folder / "train.txt", 1200), write_text(folder / "validation.txt", 330)
    return write_config(folder / "run.yaml", base, train, evaluation, task="causal-lm")


def batches_of(config, *overrides, done=0, report=ignore):
    inputs = load_inputs(load_config(config, [*OVERRIDES, *overrides]))
    return [(batch, batch.collate(batch.indices)) for batch in islice(inputs.steps(done, report), 20)]


def test_a_large_buffer_gives_the_steps_of_the_whole_data(config):
    whole = batches_of(config, "data.streaming=false")
    events = []
    streamed = batches_of(config, report=events.append)
    assert len(whole[9][1].ids) == 3, "the last batch of a pass is short"
    for (_, expected), (_, found) in zip(whole, streamed, strict=True):
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
        assert torch.equal(found.labels, expected.labels)
    assert [event["step"] for event in events] == ["data.train is exhausted after 120 rows; pass 2 over it begins"]
    assert streamed[-1][0].counts.passes == 2


def test_steps_that_are_done_are_left_out(config):
    for streaming in ("true", "false"):
        whole, rest = (batches_of(config, f"data.streaming={streaming}", done=done) for done in (0, 13))
        for (_, expected), (_, found) in zip(whole[13:], rest, strict=False):
            assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_same_global_batch(config, world_size):
    shared = batches_of(config, "shuffle_buffer=20", f"cluster.workers={world_size}")
    for (batch, whole), (_, alone) in zip(shared, batches_of(config, "shuffle_buffer=20"), strict=True):
        assert torch.equal(whole.ids, alone.ids)
        shares = [batch.collate(micro_batches(batch.indices, rank, world_size, 1)[0]) for rank in range(world_size)]
        assert torch.equal(torch.cat([share.ids for share in shares]), whole.ids)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)


def test_measuring_sees_the_first_examples_of_the_training(config):
    inputs = load_inputs(load_config(config, [*OVERRIDES, "shuffle_buffer=20"]))
    trained = [batch.collate(batch.indices).ids for batch in islice(inputs.steps(0, ignore), 4)]
    assert inputs.train.numbers.tolist() == torch.cat(trained).tolist()
    assert inputs.num_examples is None
    assert np.concatenate(inputs.training_batches(0)).max() == 31


def test_the_plan_of_a_stream_is_its_steps(config):
    loaded = load_config(config, OVERRIDES)
    assert count_examples(loaded, None) is None
    plan = plan_training(loaded.train, None)
    assert (plan.num_steps, plan.interval) == (12, 500)
    assert plan.learning_rates() == plan_training(loaded.train, 100).learning_rates()


@pytest.mark.slow
@pytest.mark.ranks
def test_a_stream_trains_as_the_whole_data_and_resumes(config, tmp_path):
    """Twelve steps on 75 examples end in the second pass; the interrupted run resumes from step 4."""
    runs = {name: tmp_path / name for name in ("whole", "streamed", "resumed", "alone")}
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, f"output={runs['streamed']}")
    for name in ("whole", "resumed", "alone"):  # one subset for all: measuring draws other examples of the whole data
        runs[name].mkdir()
        (runs[name] / "subset.safetensors").write_bytes((runs["streamed"] / "subset.safetensors").read_bytes())
    whole = ("data.streaming=false", f"output={runs['whole']}")
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, *whole)
    run_on_ranks(2, "tests.on_ranks.finetune", 6, config, *OVERRIDES, f"output={runs['resumed']}")
    assert not (runs["resumed"] / "result.json").exists()
    run_on_ranks(2, "tests.on_ranks.finetune", 0, config, *OVERRIDES, f"output={runs['resumed']}")
    run_on_ranks(1, "tests.on_ranks.finetune", 0, config, *OVERRIDES, f"output={runs['alone']}")

    results = {name: json.loads((folder / "result.json").read_text()) for name, folder in runs.items()}
    deltas = {name: adapeft.Delta.load(folder / "delta.safetensors").changes for name, folder in runs.items()}
    for name in ("whole", "resumed"):
        assert results[name]["history"] == results["streamed"]["history"]
        for key, change in deltas["streamed"].items():
            assert torch.equal(deltas[name][key].values, change.values)
    for found, expected in zip(results["alone"]["history"], results["streamed"]["history"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert results["streamed"]["stream"] == results["resumed"]["stream"] == results["alone"]["stream"]
    assert results["streamed"]["stream"] == {"passes": 2, "rows": 240, "made": 150, "examples": 91, "truncated": 0}
    assert "stream" not in results["whole"]
