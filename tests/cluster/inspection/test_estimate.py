"""``adapeft estimate``, and errors of runs that do not fit the machine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import JetMoeConfig, JetMoeForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from adapeft.config.load import load_config, parse_select
from adapeft.errors import AdapeftError
from adapeft.measure.shards.shards import Slice
from adapeft.measure.statistics import ElementShard, Statistics
from adapeft.memory.estimate import Pass, memory, moments, offloaded
from adapeft.methods.registry import METHODS, get_method
from adapeft.ranks import OneRank
from adapeft.sections.select import Select
from adapeft.selection.choose import choose
from adapeft.tune.attach import attach
from cluster.inspection import fits
from cluster.inspection.estimate import estimate_of, remarks
from cluster.inspection.inspect import inspect
from cluster.ranks.inputs import load_inputs
from cluster.zero.settings import zero_of
from tests.support.checkpoints import (
    save_model,
    save_tokenizer,
    write_bert,
    write_colours,
    write_config,
    write_gpt2,
    write_text,
)
from tests.support.quantized import scale_bytes


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return the path of a config with two workers at ZeRO stage 3."""
    folder = tmp_path_factory.mktemp("classifier")
    return write_config(folder / "run.yaml", write_bert(folder / "base"), *write_colours(folder))


@pytest.fixture
def weightless(monkeypatch):
    """Fail if weights are loaded or a worker is started."""

    def must_not_be_called(*_, **__):
        raise AssertionError("called before the run was found to fit")

    monkeypatch.setattr(ray, "init", must_not_be_called)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", must_not_be_called)


def test_the_command_lists_every_part_and_stage(command, classifier, weightless):
    done = command("estimate", classifier)
    assert done.returncode == 0, done.stderr
    for word in (
        "per device: workers 2, ZeRO stage 3",
        "measuring",
        "training",
        "weights",
        "activations",
        "total",
        "sent",
    ):
        assert word in done.stdout
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("ZeRO stage")] == list("0123")


@pytest.mark.slow
def test_a_range_of_workers_is_judged_by_the_fewest(command, classifier, weightless):
    done = command("estimate", classifier, "cluster.workers=12", "min_workers=2")
    assert done.returncode == 0, done.stderr
    assert "per device: workers 2, ZeRO stage 3" in done.stdout
    header = next(line for line in done.stdout.splitlines() if line.startswith("largest stage, by workers"))
    assert header.split()[-1] == "12"
    assert "estimated for 2 workers (cluster.min_workers)" in done.stdout


@pytest.mark.slow
def test_a_language_model_by_element(command, tmp_path, weightless):
    train, evaluation = write_text(tmp_path / "train.txt", 1600), write_text(tmp_path / "validation.txt", 330)
    config = write_config(tmp_path / "run.yaml", write_gpt2(tmp_path / "base"), train, evaluation, task="causal-lm")
    done = command("estimate", config, "groups=element", "model.gradient_checkpointing=true", "model.dtype=bfloat16")
    assert done.returncode == 0, done.stderr


USUAL = ("adapeft", "lora", "sam", "mixout-reset")


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method in USUAL else pytest.mark.slow) for method in METHODS]
)
def test_every_method_can_be_estimated(classifier, method):
    budget = "100%" if method in ("full", "lora", "adapter") else "20%"
    config = load_config(classifier, [f"select.method={method}", f"budget={budget}", "train.micro_batch_size=2"])
    estimate = estimate_of(inspect(config))
    held = estimate.memory(zero_of(config.cluster))
    measures = get_method(method).measures_loss
    assert held["measuring" if measures else "choosing"].weights > 0
    assert held["training"].optimizer >= 8 * estimate.subset.count / 2


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("sam", 4),
        ("snip", 8),
        *(pytest.param(method, 4, marks=pytest.mark.slow) for method in ("fish", "child-tuning-d")),
    ],
)
def test_scores_of_elements_need_their_sums_and_one_gradient(classifier, method, size, monkeypatch):
    config = load_config(classifier, [f"select.method={method}", "groups=element"])
    inspection, zero = inspect(config), zero_of(config.cluster)
    held, _ = moments(estimate_of(inspection).measuring(zero), zero)
    sizes = [info.count for info in inspection.groups.parameters]
    assert held.statistics == size * sum(sizes) / 2
    assert held.gradients == 0
    head = sum(estimate_of(inspection)._count("measuring", 1, 8).sizes) - sum(sizes)
    assert held.optimizer <= 8 * head / 2
    monkeypatch.setattr("cluster.inspection.estimate._free", lambda parameter: None)
    kept = estimate_of(inspection).measuring(zero).passes.activations  # without gradients
    assert 0 < kept <= held.activations <= kept + 4 * max(sizes)


@pytest.mark.slow
def test_squares_over_micro_batches_need_the_gradient_of_the_batch(classifier):
    def statistics(method: str) -> int:
        config = load_config(classifier, [f"select.method={method}", "groups=element", "select.micro_batch_size=2"])
        estimate = estimate_of(inspect(config))
        elements = int(estimate.groups.counts.sum())
        return estimate.memory(zero_of(config.cluster))["measuring"].statistics / (elements / 2)

    assert [statistics(method) for method in ("sam", "fish", "child-tuning-d")] == [4, 4, 8]


@pytest.fixture(scope="module", params=["one-24gb-gpu.yaml", "one-12gb-gpu.yaml"])
def eight_billion(request, tmp_path_factory):
    """A ready config for one GPU, with the shapes of Qwen3-8B and short texts."""
    shapes = Qwen3Config(
        **{"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "architectures": ["Qwen3ForCausalLM"]},
    )
    return ready(request.param, shapes, tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def seventy_billion(request, tmp_path):
    """A ready config with the shapes of Llama-3.1-70B."""
    shapes = LlamaConfig(
        **{"vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "architectures": ["LlamaForCausalLM"]},
        max_position_embeddings=131_072,
    )
    return ready(request.param, shapes, tmp_path)


def ready(name, shapes, folder):
    """Return a config of ``deploy/configs`` that measures elements, with a model of these shapes and short texts."""
    shapes.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    data = {
        name: write_text(folder / f"{name}.txt", size) for name, size in {"train": 300_000, "evaluation": 3000}.items()
    }
    return load_config(
        f"deploy/configs/{name}",
        [f"model.name={folder / 'base'}", "groups=element", *(f"data.{name}={path}" for name, path in data.items())],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "select", [{"groups": "element"}, {"groups": "row"}, {"method": "lora"}, {"method": "random", "groups": "row"}]
)
def test_choosing_for_a_large_model_holds_no_more_than_training_what_is_chosen(eight_billion, select):
    shared = {key: getattr(eight_billion.select, key) for key in ("budget", "calibration", "batch_size")}
    own = parse_select({"micro_batch_size": 1, **shared, **select})
    config = eight_billion.model_copy(update={"select": own})
    held = estimate_of(inspect(config)).memory(zero_of(config.cluster))
    choosing = held.get("measuring") or held["choosing"]
    is_quantized = config.model.quantization is not None
    # Windows, factors and their sums do not shrink with the weights, which take 6 GB instead of 16.
    assert choosing.total <= (1.2 if is_quantized else 1.1) * held["training"].total
    assert max(stage.total for stage in held.values()) < 0.9 * (12e9 if is_quantized else 24e9)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_are_counted_as_they_are_stored(classifier, quantization):
    config = load_config(classifier, [f"quantization={quantization}", "zero_stage=0", "groups=row", "rank=4"])
    estimate = estimate_of(inspect(config))
    held = estimate.memory(zero_of(config.cluster))["training"]
    model = attach(load_inputs(config).model(), estimate.subset)
    stored = sum(parameter.nbytes for parameter in model.parameters()) + scale_bytes(model)
    assert held.weights == stored
    # At stage 3 bitsandbytes keeps what is gathered: each of the two workers has all codes and its half.
    load, zero = estimate.training(zero_of(config.cluster)), replace(zero_of(config.cluster), stage=3)
    packed = sum(p.nbytes for p in model.parameters() if not p.is_floating_point()) + scale_bytes(model)
    assert load.packed == packed
    assert memory(load, zero).weights - memory(replace(load, packed=0), zero).weights == packed + -(-packed // 2)


def test_what_a_run_would_refuse_has_no_estimate(command, classifier):
    """int8 under ZeRO-3 with several workers: see ``test_refused_inputs``."""
    done = command("estimate", classifier, "quantization=int8", "zero_stage=0", "groups=row", "rank=4")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[2]: line for line in done.stdout.splitlines() if line.startswith("ZeRO stage")}
    assert {stage: row.count("refused") for stage, row in rows.items()} == {"0": 0, "1": 0, "2": 0, "3": 3}
    assert rows["3"].split()[-3:] == ["refused"] * 3


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    """Config of a base that torch before 1.6 has pickled, which every worker at ZeRO stage 3 loads whole."""
    folder = tmp_path_factory.mktemp("pickled")
    base = write_bert(folder / "base")
    weights = base / "model.safetensors"
    torch.save(load_file(weights), base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    weights.unlink()
    return write_config(folder / "run.yaml", base, *write_colours(folder))


def test_what_every_worker_loads_whole_is_said(command, pickled, weightless):
    done = command("estimate", pickled)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "loading: every worker holds the whole base in its machine's memory (torch before 1.6 has pickled" in said


def test_the_memory_of_loading_is_that_of_the_whole_base(classifier, pickled):
    def loads(path, *overrides):
        config = load_config(path, overrides)
        return estimate_of(inspect(config)).loads(zero_of(config.cluster))

    assert "loading" not in loads(classifier)
    assert "loading" not in loads(pickled, "zero_stage=2")
    on_gpus = ("gpus_per_worker=1", "groups=row")
    assert "loading" not in loads(classifier, *on_gpus, "quantization=nf4")  # quantized on the GPU
    for path, *overrides in ((pickled,), (pickled, *on_gpus), (classifier, "quantization=nf4", "groups=row")):
        found = loads(path, *overrides)
        config = load_config(path, overrides)
        training, held = found["training"], memory(found["loading"], zero_of(config.cluster))
        assert held.weights == 4 * (sum(training.sizes) + max(training.sizes)) + training.packed
        assert held.total == held.weights + held.process
        assert held.process > 0
    # Cast while they are loaded, the stored ones are held until the end.
    found, config = loads(pickled, "dtype=bfloat16"), load_config(pickled, ["dtype=bfloat16"])
    stored = (Path(config.model.name) / "pytorch_model.bin").stat().st_size
    held = memory(found["loading"], zero_of(config.cluster))
    assert held.weights == stored + 2 * sum(found["training"].sizes)


@pytest.mark.parametrize("gpus", [0, 1])
def test_loading_the_whole_base_in_every_worker_is_refused_where_it_does_not_fit(pickled, monkeypatch, gpus):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(pickled, [f"gpus_per_worker={gpus}"])
    estimate = estimate_of(inspect(config))
    needed = 2 * estimate.memory(zero_of(config.cluster))["loading"].total  # of both workers, on the host
    free = int(0.99 * needed / fits.TOLERANCE)
    monkeypatch.setattr(fits, "available_memory", lambda *, gpu: 2**40 if gpu else free)
    with pytest.raises(AdapeftError, match=r"^loading does not fit: 2 workers need .* save the base as safetensors"):
        fits.check_memory(estimate)
    if gpus:  # without them the run needs more than its loading
        free = int(1.01 * needed / fits.TOLERANCE)
        fits.check_memory(estimate)


@pytest.mark.slow
@pytest.mark.parametrize("seventy_billion", ["one-node-8-gpus.yaml"], indirect=True)
def test_each_of_eight_cards_holds_its_share_of_a_large_model(seventy_billion):
    zero = zero_of(seventy_billion.cluster)
    held = estimate_of(inspect(seventy_billion)).memory(zero)
    assert held.keys() == {"measuring", "training"}
    for parts in held.values():
        assert parts.total < 0.9 * 80e9
        # The embedding, the largest piece, is whole during its use.
        assert 140e9 / 8 + 2 * 128_256 * 8192 <= parts.weights < 143e9 / 8 + 2 * 128_256 * 8192 + 1e9


@pytest.mark.slow
@pytest.mark.parametrize("seventy_billion", ["one-24gb-gpu-70b.yaml"], indirect=True)
def test_a_card_holds_a_piece_of_the_offloaded_weights_and_the_machine_its_share(
    seventy_billion, tmp_path, monkeypatch
):
    zero = zero_of(seventy_billion.cluster)
    estimate = estimate_of(inspect(seventy_billion))
    held, loads = estimate.memory(zero), estimate.loads(zero)
    assert held.keys() == {"measuring", "training"}
    for stage, parts in held.items():
        assert parts.total < 0.9 * 24e9
        # The embedding is the largest piece.
        assert 2 * 128_256 * 8192 <= parts.weights < 2 * 128_256 * 8192 + 2e9
        assert 140e9 < offloaded(loads[stage], zero) < 143e9
    assert sum("cluster.offload = cpu: each worker keeps 13" in line for line in remarks(estimate, zero)) == 1

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    free = {True: int(24e9), False: int(139e9)}
    monkeypatch.setattr(fits, "available_memory", lambda *, gpu: free[gpu])
    with pytest.raises(AdapeftError, match=r"cluster.offload = cpu does not fit: 1 workers keep 13\d.* which has 129"):
        fits.check_memory(estimate)
    free[False] = int(160e9)
    fits.check_memory(estimate)

    cluster = seventy_billion.cluster.model_copy(update={"offload": "nvme", "offload_folder": str(tmp_path)})
    estimate = replace(estimate, config=seventy_billion.model_copy(update={"cluster": cluster}))
    free[False] = int(10e9)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=int(139e9)))
    with pytest.raises(AdapeftError, match=r"cluster.offload = nvme does not fit: 1 workers keep 13\d.* which has 129"):
        fits.check_memory(estimate)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=int(160e9)))
    fits.check_memory(estimate)


@pytest.mark.slow
def test_less_is_held_with_smaller_micro_batches(classifier):
    def activations(micro_batch_size: int) -> int:
        config = load_config(classifier, [f"train.micro_batch_size={micro_batch_size}"])
        return estimate_of(inspect(config)).training(zero_of(config.cluster)).passes.activations

    assert activations(2) < 0.3 * activations(8)


@pytest.mark.parametrize("name", ["run", "select"])
def test_a_run_that_does_not_fit_is_refused(command, classifier, weightless, monkeypatch, name):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(classifier, [])
    estimate = estimate_of(inspect(config))
    both = 2 * estimate.memory(zero_of(config.cluster))["measuring"].total
    monkeypatch.setattr(fits, "available_memory", lambda *, gpu: int(0.99 * both / fits.TOLERANCE))
    done = command(name, classifier)
    assert done.returncode == 2
    assert "measuring does not fit: 2 workers need" in " ".join(done.stderr.split())
    monkeypatch.setattr(fits, "available_memory", lambda *, gpu: int(1.01 * both / fits.TOLERANCE))
    fits.check_memory(estimate)
    # The memory of this machine says nothing about the machines of a cluster.
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere")
    monkeypatch.setattr(fits, "available_memory", lambda *, gpu: 1)
    fits.check_memory(estimate)


def test_what_only_training_needs_refuses_training_and_not_choosing(command, classifier, weightless, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    overrides = ["train.batch_size=512", "train.micro_batch_size=256", "select.method=magnitude"]
    config = load_config(classifier, overrides)
    estimate = estimate_of(inspect(config))
    held = estimate.memory(zero_of(config.cluster))
    assert held["choosing"].total < held["training"].total
    monkeypatch.setattr(fits, "available_memory", lambda *, gpu: int(1.99 * held["training"].total / fits.TOLERANCE))
    fits.check_memory(estimate, trains=False)
    with pytest.raises(AdapeftError, match="training does not fit: 2 workers need"):
        fits.check_memory(estimate)
    assert command("select", classifier, *overrides).returncode == 0
    done = command("train", classifier, *overrides)
    assert done.returncode == 2
    assert "training does not fit: 2 workers need" in " ".join(done.stderr.split())


def test_what_is_free_is_less_than_there_is():
    assert 2**20 < (fits.available_memory(gpu=False) or 0) < 2**50


@pytest.mark.parametrize(
    ("groups", "stage"),
    [
        *[("row", 0), ("tensor", 3)],
        *[
            pytest.param(groups, stage, marks=pytest.mark.slow)
            for groups, stage in [
                ("element", 2),
                ("row", 2),
                ("row", 3),
                ("element", 0),
                ("element", 3),
                ("tensor", 0),
                ("tensor", 2),
            ]
        ],
    ],
)
def test_a_budget_in_bytes_is_spent_and_not_exceeded(classifier, groups, stage):
    """For random values, the estimate for the chosen subset is within the limit and close to it."""
    given = ["budget=0.5%", "select.exclude=*embeddings*", f"groups={groups}", f"zero_stage={stage}"]
    plenty = inspect(load_config(classifier, [*given, "memory_per_device=2GiB"])).limit
    limit = plenty.limit - plenty.room + 30_000
    config = load_config(classifier, [*given, f"memory_per_device={limit}"])
    inspection = inspect(config)
    candidates, rng = inspection.groups, np.random.default_rng(0)
    columns = {"squared_gradient": rng.random(candidates.num_groups)}
    shards = tuple(
        ElementShard(Slice(index, 0, info.count), {"squared_gradient": torch.from_numpy(rng.random(info.count))})
        for index, info in enumerate(candidates.parameters)
    )
    common = config.select.model_dump(include=set(Select.model_fields))
    settings = parse_select({**common, "method": "sam", "groups": groups})
    statistics = Statistics(candidates, columns, shards if groups == "element" else ())
    subset = choose(settings, statistics, reach=1.0, seed=0, ranks=OneRank(), limit=inspection.limit)

    assert subset.choice.memory_per_device == limit
    assert subset.choice.memory_bytes <= inspection.limit.room
    assert 0 < subset.count < candidates.counts.sum()
    dearest = inspection.limit.costs(candidates).max() if groups != "element" else 100
    assert subset.choice.memory_bytes > inspection.limit.room - dearest
    held = replace(estimate_of(inspection), subset=subset).memory(zero_of(config.cluster))["training"]
    assert held.total <= limit


def test_a_limit_that_the_model_alone_exceeds_is_refused(command, classifier, weightless):
    done = command("run", classifier, "budget=0.5%", "memory_per_device=100MiB")
    assert done.returncode == 2
    message = " ".join(done.stderr.split())
    assert "select.memory_per_device = 100 MiB: training needs" in message
    assert "even with a budget of 0 (process" in message


def test_what_does_not_go_with_a_limit_is_refused(command, classifier):
    assert "budget = 20% is another limit" in " ".join(
        command("config", classifier, "memory_per_device=2GiB").stderr.split()
    )
    errors = command("config", classifier, "memory_per_device=2 apples", "budget=0.5%").stderr
    assert "should be bytes such as 24GiB" in " ".join(errors.split())
    errors = command("config", classifier, "memory_per_device=2GiB", "budget=0.5%", "method=lora").stderr
    assert "lora needs a budget of parameters" in " ".join(errors.split())


def write_jet_moe(folder):
    """Write a mixture of experts whose routing uses lists of numbers, which depend on the weights."""
    blocks = {"hidden_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8}
    experts = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    return save_model(JetMoeForCausalLM(JetMoeConfig(vocab_size=25, eos_token_id=3, **blocks, **experts)), folder)


@pytest.fixture(scope="module")
def uncountable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncountable")
    train, evaluation = write_text(folder / "train.txt", 1600), write_text(folder / "validation.txt", 330)
    return write_config(folder / "run.yaml", write_jet_moe(folder / "base"), train, evaluation, task="causal-lm")


def test_what_cannot_be_counted_is_bounded_and_said(command, uncountable, weightless):
    done = command("estimate", uncountable)
    assert done.returncode == 0, done.stderr
    assert "training: its activations cannot be counted without weights" in done.stdout
    assert next(line for line in done.stdout.splitlines() if line.startswith("activations")).count("≤") == 2


def test_a_bound_forbids_nothing(uncountable, monkeypatch):
    """Only the rest of the estimate can refuse a run."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(
        "cluster.inspection.estimate.PROCESS", {"local": 0, "ray": 0}
    )  # otherwise this tiny model would hardly matter
    config = load_config(uncountable, [])
    estimate = estimate_of(inspect(config))
    zero = zero_of(config.cluster)
    loads = estimate.loads(zero).values()
    rest = max(2 * memory(replace(load, passes=Pass(0, 0), freed=0, heap=0), zero).total for load in loads)
    assert rest < min(2 * memory(load, zero).total for load in loads) / fits.TOLERANCE
    monkeypatch.setattr(fits, "available_memory", lambda *, gpu: int(1.01 * rest / fits.TOLERANCE))
    fits.check_memory(estimate)
    monkeypatch.setattr(fits, "available_memory", lambda *, gpu: int(0.9 * rest / fits.TOLERANCE))
    with pytest.raises(AdapeftError, match="does not fit"):
        fits.check_memory(estimate)


def test_a_limit_that_a_bound_exceeds_says_so(command, uncountable):
    done = command("estimate", uncountable, "memory_per_device=705MiB", "budget=0.5%", "groups=row")
    assert done.returncode == 2
    assert "The activations are only a wide bound, because they cannot be counted without weights" in done.stderr
