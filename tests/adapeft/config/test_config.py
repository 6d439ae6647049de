"""The config: defaults, overrides, errors and writing to YAML."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from adapeft.config.config import Config
from adapeft.config.data import DATA
from adapeft.config.keys import KEYS, SECTIONS, differences, measured_differently, measurement_key
from adapeft.config.load import load_config, parse_config, parse_select
from adapeft.config.write import defaults_yaml, json_schema, to_yaml
from adapeft.errors import AdapeftError
from adapeft.methods.options import OPTIONS
from adapeft.sections.budget import Budget
from adapeft.sections.paths import is_local
from adapeft.sections.section import Section

MINIMAL = """
model: {name: bert-base-uncased, task: sequence-classification}
data: {train: "glue:cola@train", evaluation: "glue:cola@validation"}
output: runs/cola
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads YAML text with overrides, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def load(text: str = MINIMAL, *overrides: str) -> Config:
        Path("run.yaml").write_text(text)
        return load_config("run.yaml", overrides)

    return load


# --- defaults --------------------------------------------------------------------------------------------------------


def test_three_lines_are_enough(load):
    config = load()
    assert config.select.budget == Budget.parse("0.5%")
    assert config.select.always_train == ("auto",)
    assert (config.select.calibration, config.select.batch_size, config.train.batch_size) == (512, 16, 32)
    assert (config.train.learning_rate, config.cluster.workers, config.seed) == ("auto", 1, 0)


@pytest.mark.parametrize(("method", "granularity"), [("adapeft", "element"), ("sam", "element"), ("random", "element")])
def test_groups_are_the_methods_own(method, granularity):
    assert parse_select({"method": method}).granularity == granularity
    assert parse_select({"method": method, "groups": "tensor"}).granularity == "tensor"


@pytest.mark.parametrize("given", [{"servable": True}, {"options": ["row", "lora"]}])
def test_rows_are_the_default_where_elements_cannot_be(given):
    assert parse_select(given).granularity == "row"
    with pytest.raises(AdapeftError, match="element"):
        parse_select({**given, "groups": "element"})


def test_only_a_joint_choice_of_elements_is_filled():
    assert parse_select({"groups": "row"}).fill == "auto"
    with pytest.raises(AdapeftError, match=r"fill = true: only the joint choice of single elements leaves budget"):
        parse_select({"groups": "row", "fill": True})


def test_every_key_is_described():
    assert not [key for key, field in KEYS.items() if not field.description]


def test_sections_are_the_sections_of_config():
    tree = Config.model_validate(yaml.safe_load(MINIMAL))
    nested = [name for name, _ in tree if isinstance(getattr(tree, name), Section)]
    assert nested == list(SECTIONS)
    assert all(isinstance(getattr(tree, name), section) for name, section in SECTIONS.items())


def test_frozen_and_hashable(load):
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.select.budget = Budget.parse("1%")
    assert hash(config) == hash(load())
    scheduled = [load(MINIMAL, "train.lr_scheduler_kwargs.num_cycles=3") for _ in range(2)]
    assert hash(scheduled[0]) == hash(scheduled[1]) != hash(config)
    assert scheduled[0].train.lr_scheduler_kwargs == {"num_cycles": 3}


def test_no_torch_is_imported():
    heavy = "{'torch', 'transformers', 'ray', 'deepspeed', 'datasets'}"
    code = f"import sys, adapeft.config.load; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["1e-3", "'1e-3'", "0.001"])
def test_numbers_in_scientific_notation(load, written):
    assert load(MINIMAL + f"train: {{learning_rate: {written}}}").train.learning_rate == 0.001


@pytest.mark.parametrize(
    ("written", "reach"), [("auto", "auto"), ("0.01", 0.01), (".inf", math.inf), ("inf", math.inf), ("1e-4", 1e-4)]
)
def test_reach(load, written, reach):
    assert load(MINIMAL + f"select: {{reach: {written}}}").select.reach == reach
    assert load(MINIMAL, f"reach={written}").select.reach == reach


@pytest.mark.parametrize(
    ("written", "patterns"),
    [("auto", ("auto",)), ("'*pooler*'", ("*pooler*",)), ("[auto, '*pooler*']", ("auto", "*pooler*")), ("[]", ())],
)
def test_one_pattern_is_a_list(load, written, patterns):
    assert load(MINIMAL + f"select: {{always_train: {written}}}").select.always_train == patterns


def test_environment_variables(load, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert load(MINIMAL, "output=${oc.env:SCRATCH}/cola").output == "/scratch/me/cola"


def test_unset_environment_variable(load):
    with pytest.raises(AdapeftError, match=r"output: .*'NOWHERE_SET' not found.*; set the variable"):
        load(MINIMAL, "output=${oc.env:NOWHERE_SET}")


def test_empty_section_keeps_its_defaults(load):
    assert load(MINIMAL + "train:\n") == load()


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["select.budget=1%", "budget=1%", "budget=0.01", "budget = 1%"])
def test_override(load, override):
    assert load(MINIMAL, override).select.budget == Budget.parse("1%")


def test_overrides_go_over_the_file_and_later_ones_over_earlier(load):
    config = load(MINIMAL + "seed: 1\ncluster: {workers: 2}", "seed=2", "seed=3", "zero_stage=1")
    assert (config.seed, config.cluster.workers, config.cluster.zero_stage) == (3, 2, 1)


def test_shorthand_values(load):
    config = load(
        MINIMAL, "learning_rate=1e-4", "exclude=*embeddings*", "always_train=[auto,'*pooler*']", "max_steps=5"
    )
    assert config.train.learning_rate == 1e-4
    assert config.select.exclude == ("*embeddings*",)
    assert config.select.always_train == ("auto", "*pooler*")
    assert config.train.max_steps == 5
    assert load(MINIMAL, "max_grad_norm=null").train.max_grad_norm is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "batch_size=8",
            "batch_size=8: 'batch_size' has more than one meaning; write select.batch_size=8 or train.batch_",
        ),
        ("train=x.csv", "train=x.csv: 'train' has more than one meaning; write data.train=x.csv"),
        ("select=sam", "select=sam: 'select' is a section; write select.KEY=VALUE"),
        ("budget", "budget: an override is written key=value"),
        ("bugdet=1%", "bugdet: unknown key. Did you mean 'select.budget'"),
        ("train.budget=1%", "train.budget: unknown key. Did you mean 'select.budget'"),
        ("zzz=1", "zzz: unknown key. `adapeft config` lists all keys"),
    ],
)
def test_override_refused(load, override, message):
    with pytest.raises(AdapeftError, match=message):
        load(MINIMAL, override)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "overrides", "message"),
    [
        ("flex_attention", [], "it trains only on GPUs; set cluster.gpus_per_worker: 1"),
        ("flash_attention_2", [], "it trains only on GPUs"),
        ("flash_attention_2", ["gpus_per_worker=1"], "does not support float32; set model.dtype: bfloat16"),
        ("flash_attention_3", ["gpus_per_worker=1", "dtype=bfloat16"], None),
        ("flex_attention", ["gpus_per_worker=1"], None),
        ("sdpa", [], None),
    ],
)
def test_attention_that_could_not_train(load, attention, overrides, message):
    arguments = (MINIMAL, f"model.attn_implementation={attention}", *overrides)
    if message is None:
        assert load(*arguments).model.attn_implementation == attention
    else:
        with pytest.raises(AdapeftError, match=f"\n  model.attn_implementation = {attention}: {message}"):
            load(*arguments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["streaming=true", "max_steps=9"],
            r"train.learning_rate = auto: short trainings hold out .* data.streaming divides none; set a number",
        ),
        (["streaming=true"], r"\n  train.max_steps = null: with data.streaming .*; set train.max_steps, the number of"),
        (
            ["streaming=true", "max_steps=9", "train.learning_rate=1e-3", "train_sampling_strategy=group_by_length"],
            r"train.train_sampling_strategy = group_by_length: with data.streaming .* unknown; set random",
        ),
        (
            ["shuffle_buffer=9"],
            r"data.shuffle_buffer = 9: is read only with streaming: true; leave it out, or set that",
        ),
        (["evaluation_examples=9"], r"data.evaluation_examples = 9: is read only with streaming: true"),
        (["streaming=true", "shuffle_buffer=0"], r"data.shuffle_buffer = 0: should be greater than 0 \(with streaming"),
        (
            ["streaming=true", "task=sequence-classification"],
            r"data.streaming = true: is an option of the tasks .*causal-lm.*model.task is sequence-classif",
        ),
    ],
)
def test_streaming_without_what_it_needs(load, overrides, message):
    with pytest.raises(AdapeftError, match=message):
        load(MINIMAL, "task=causal-lm", *overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.budget=0", r"select\.budget = 0: must be above 0; write a fraction such as 0\.5%"),
        ("select.budget=200%", r"select\.budget = 200%: is more than all parameters"),
        ("select.reach=-1", r"select\.reach = -1: should be 'auto' or greater than 0 \(how far"),
        ("select.reach=far", r"select\.reach = far: should be 'auto' or a number"),
        ("select.reach=.nan", r"select\.reach = \.nan: should be 'auto' or greater than 0"),
        ("select.groups=rwo", r"select\.groups = rwo: should be 'auto', 'tensor', 'row', .* mean 'row'\?"),
        ("select.calibration=1", r"select\.calibration = 1: should be greater than or equal to 2"),
        ("select.warmup_steps=-1", r"select\.warmup_steps = -1: should be 'auto' or greater than or equal to 0"),
        ("select.include=3", r"select\.include = 3: should be a list"),
        ("select.shrinkage=maybe", r"select\.shrinkage = maybe: should be true or false"),
        ("train.epochs=0", r"train\.epochs = 0: should be greater than 0 \(passes over the training data\)"),
        ("train.epochs=.inf", r"train\.epochs = \.inf: should be finite"),
        ("train.epochs=1e6", r"train\.epochs = .*: should be less than or equal to 100000"),
        ("train.max_steps=10000001", r"train\.max_steps = 10000001: should be less than or equal to 10000000"),
        ("train.learning_rate=1e38", r"train\.learning_rate = .*: should be 'auto' or less than or equal to 10{37} "),
        ("train.learning_rate=.nan", r"train\.learning_rate = \.nan: should be"),
        ("select.probe_learning_rate=0", r"select\.probe_learning_rate = 0: should be greater than 0"),
        ("train.batch_size=2.5", r"train\.batch_size = 2\.5: should be a whole number"),
        ("train.learning_rate=high", r"train\.learning_rate = high: should be 'auto' or a number"),
        ("train.warmup_ratio=1", r"train\.warmup_ratio = 1: should be less than 1"),
        (
            "lr_scheduler_type=greedy",
            r"lr_scheduler_type = greedy: its learning rates depend on the training, but",
        ),
        ("lr_scheduler_type=reduce_lr_on_plateau", r"= reduce_lr_on_plateau: .* Give another schedule, such as cosine"),
        ("lr_scheduler_type=cosin", r"lr_scheduler_type = cosin: should be 'linear', .* mean 'cosine'\?"),
        ("lr_scheduler_kwargs=3", r"lr_scheduler_kwargs = 3: should be keys and values"),
        ("train.lr_scheduler_kwargs.power=[1]", r"lr_scheduler_kwargs = \{power: \[1\]\}: should be a string"),
        ("report_to=wandbs", r"report_to = wandbs: should be 'tensorboard', .* mean 'wandb'"),
        ("report_to=[wandbs]", r"train\.report_to = \[wandbs\]: should be 'tensorboard', 'wandb' or 'mlflow'"),
        ("data.max_length=0", r"data\.max_length = 0: should be greater than 0"),
        ("data.metric=accurate", r"data\.metric = accurate: should be 'auto', .*Did you mean 'accuracy'"),
        ("cluster.zero_stage=4", r"cluster\.zero_stage = 4: should be less than or equal to 3"),
        ("cluster.gpus_per_worker=2", r"cluster\.gpus_per_worker = 2: should be less than or equal to 1"),
        ("model.revision=12", r"model\.revision = 12: should be a string, in quotes"),
        ("output=", r"output = null: should be a string"),
        ("output=''", r"output = '': should be not empty"),
        ("seed=-1", r"seed = -1: should be greater than or equal to 0"),
    ],
)
def test_value_refused(load, override, message):
    with pytest.raises(AdapeftError, match=message):
        load(MINIMAL, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selekt: {budget: 1%}", "selekt: unknown key. Did you mean .*'select'"),
        ("budget: 1%", "budget: unknown key. Did you mean 'select.budget'"),
        ("select: {bugdet: 1%}", "select.bugdet: unknown key. Did you mean 'select.budget'"),
        ("select: {epochs: 1}", "select.epochs: unknown key. Did you mean 'train.epochs'"),
        ("cluster: 3", "cluster = 3: is a section; write its keys below it"),
        ("7: seven", "7: Keys should be strings"),
    ],
)
def test_misplaced_keys(load, text, message):
    with pytest.raises(AdapeftError, match=message):
        load(MINIMAL + text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.text_pair=question",
            "data.text_pair = question: is an option of .*sequence-classification.*, and model.task is causal-lm.",
        ),
        ("data.label=sentiment", "data.label = sentiment: is an option of .*sequence-classification"),
        ("data.padding=max_length", "data.padding = max_length: is an option of .*sequence-classification"),
        ("data.metric=accuracy", "data.metric = accuracy: should be 'auto', 'loss' or 'perplexity'"),
        ("data.lable=sentiment", "data.lable: unknown key. Did you mean 'data.label'"),
    ],
)
def test_keys_of_another_task_are_refused_by_its_name(load, override, message):
    with pytest.raises(AdapeftError, match=message):
        load(MINIMAL, "task=causal-lm", override)


OLDER = {
    **{"train": "a.txt", "evaluation": "b.txt", "text": "text", "text_pair": None, "label": "label"},
    **{"max_length": 64, "padding": "longest", "metric": "perplexity"},
}


@pytest.mark.parametrize("unread", [{}, {"label": "sentiment", "padding": "max_length"}])
def test_whole_data_sections_of_older_versions_load(load, unread):
    text = yaml.safe_dump({"model": {"name": "gpt2", "task": "causal-lm"}, "data": OLDER | unread, "output": "runs/a"})
    data = load(text).data
    streaming = {"streaming", "shuffle_buffer", "evaluation_examples"}
    assert data.model_dump().keys() == {"train", "evaluation", "text", "max_length", "metric", *streaming}
    assert (data.max_length, data.metric) == (64, "perplexity")


def test_older_defaults_of_keys_that_the_task_does_not_read_say_nothing(load):
    assert load(MINIMAL, "task=causal-lm", "label=label", "text_pair=null") == load(MINIMAL, "task=causal-lm")


def test_a_mistake_in_model_leaves_data_to_its_task(load):
    text = yaml.safe_dump({"model": {"task": "causal-lm"}, "data": OLDER, "output": "runs/a"})
    with pytest.raises(AdapeftError, match=r"has 1 problem:\n  model.name: required"):
        load(text)


def test_the_task_decides_which_keys_data_has(load):
    assert {load(MINIMAL, f"task={task}").data.task for task in DATA} == set(DATA)
    assert all(load(MINIMAL, f"task={task}").data.task == task for task in DATA)


def test_every_key_of_a_task_is_printed(load):
    text = defaults_yaml()
    assert "--- with model.task: sequence-classification" in text
    for task, data in DATA.items():
        lines = [line.strip().removeprefix("# ") for line in text.splitlines()]
        assert all(any(line.startswith(f"{key}:") for line in lines) for key in data.model_fields), task


def test_all_problems_in_one_error(load):
    with pytest.raises(AdapeftError) as caught:
        load("model: {task: causal-lm}\nselect: {budget: 0}\ntrain: {epoch: 3}\noutput: ???", "foo", "sede=1")
    lines = str(caught.value).splitlines()
    assert lines[0] == "run.yaml has 8 problems:"
    assert [line.split()[0] for line in lines[1:]] == [
        "foo:",
        "sede:",
        "model.name:",
        "data.train:",
        "data.evaluation:",
        "output:",
        "select.budget",
        "train.epoch:",
    ]
    assert "  model.name: required (folder or hub name of the pretrained model)" in lines


def test_missing_file(load):
    load()
    with pytest.raises(
        AdapeftError, match=r"config = ran.yaml: no such file. Did you mean 'run.yaml'\? `adapeft config`"
    ):
        load_config("ran.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "run.yaml: cannot be read: (.|\n)*duplicate key seed"),
        ("select: {exclude: [*emb*]}", "run.yaml: cannot be read: (.|\n)*has to be in quotes"),
        ("- seed", "run.yaml: should be sections and keys"),
    ],
)
def test_unreadable_file(load, text, message):
    with pytest.raises(AdapeftError, match=message):
        load(text)


# --- places ----------------------------------------------------------------------------------------------------------


def test_paths_become_absolute_and_hub_names_stay(load, tmp_path):
    Path("my-model").mkdir()
    Path("saved-data").mkdir()
    local = load(
        MINIMAL, "name=my-model", "data.train=a.jsonl", "evaluation=saved-data", "statistics=runs/a", "subset=runs/b"
    )
    assert local.model.name == str(tmp_path / "my-model")
    assert local.data.train == str(tmp_path / "a.jsonl")
    assert local.data.evaluation == str(tmp_path / "saved-data")
    assert local.select.statistics == str(tmp_path / "runs/a")
    assert local.train.subset == str(tmp_path / "runs/b")
    assert local.output == str(tmp_path / "runs/cola")
    hub = load(MINIMAL)
    assert (hub.model.name, hub.data.train) == ("bert-base-uncased", "glue:cola@train")
    assert hub.resolved() == hub


def test_home_folder(load):
    assert load(MINIMAL, "output=~/runs").output == str(Path.home() / "runs")


@pytest.mark.parametrize("source", ["imdb", "imdb@test", "glue:cola@train", "nyu-mll/glue:cola@train[:10%]"])
def test_hub_data_sets_are_not_local(source):
    assert not is_local(source)


def test_a_folder_has_no_revisions(load, tmp_path):
    """transformers loads the folder as it is, whatever the revision."""
    (tmp_path / "base").mkdir()
    with pytest.raises(AdapeftError, match=r"\n  model\.revision = v1\.0: name = .*base is a folder, which has"):
        load(MINIMAL, f"model.name={tmp_path / 'base'}", "model.revision=v1.0")


# --- writing ---------------------------------------------------------------------------------------------------------


def test_yaml_round_trip(load):
    unusual = ["reach=inf", "budget=1.5M", "exclude=*emb*", "max_grad_norm=null", "learning_rate=1e-7", "seed=3"]
    config = load(MINIMAL, *unusual, "revision='12e45'")
    assert config.model.revision == "12e45"
    assert load(to_yaml(config)) == config
    assert Config.model_validate(json.loads(config.model_dump_json())) == config


def test_defaults_are_a_config_to_fill_in(load):
    text = defaults_yaml()
    required = ["name=bert-base-uncased", "task=sequence-classification", "output=runs/cola"]
    data = ["data.train=glue:cola@train", "evaluation=glue:cola@validation"]
    assert load(text, *required, *data) == load(MINIMAL)
    assert "on a part of data.train\n  learning_rate: auto\n" in text
    assert "  # parameters that are chosen together; auto: the method's default, for adapeft element" in text
    assert list(yaml.safe_load(text)) == list(Config.model_fields)
    with pytest.raises(AdapeftError, match="has 5 problems"):
        load(text)


def test_json_schema():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    budgets = [
        one["properties"]["budget"]["default"] for name, one in schema["$defs"].items() if name.endswith("Options")
    ]
    assert budgets == ["0.5%"] * len(OPTIONS)


# --- comparing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    ["budget=1%", "reach=0.1", "workers=4", "zero_stage=1", "epochs=9", "output=x", "groups=element", "metric=f1"],
)
def test_statistics_serve_other_budgets_machines_and_training(load, override):
    assert measurement_key(load(MINIMAL, override)) == measurement_key(load())


@pytest.mark.parametrize(
    "override",
    [
        *("name=x", "data.train=x.csv", "groups=tensor", "calibration=64", "direction=gradient", "seed=1"),
        *("probe_steps=9", "warmup_steps=9"),
    ],
)
def test_statistics_of_another_question_differ(load, override):
    assert measurement_key(load(MINIMAL, override)) != measurement_key(load())


def test_statistics_of_another_curvature_differ(load):
    assert measurement_key(load(MINIMAL, "groups=role", "curvature=parabola")) != measurement_key(
        load(MINIMAL, "groups=role")
    )


def test_what_auto_measures_depends_on_the_method(load):
    assert measurement_key(load())["select.groups"] == "element"
    assert measurement_key(load(MINIMAL, "servable=true"))["select.groups"] == "row"
    assert measurement_key(load(MINIMAL, "method=lora"))["select.groups"] == "tensor"
    assert measurement_key(load(MINIMAL, "groups=element")) == measurement_key(load())


def test_statistics_of_a_quantized_model_depend_on_the_rank(load):
    exact, low_rank = (measurement_key(load(), is_quantized=quantized) for quantized in (False, True))
    assert low_rank == exact | {"select.measure": "low-rank", "select.rank": 16}
    assert measurement_key(load(MINIMAL, "rank=8"), is_quantized=True) != low_rank
    assert measurement_key(load(MINIMAL, "rank=8")) == exact


def test_statistics_of_a_quantized_base_are_others(load):
    plain, none, nf4 = (
        measurement_key(load(MINIMAL, *given)) for given in ([], ["quantization=none"], ["quantization=nf4"])
    )
    assert plain == none
    assert measured_differently(nf4, plain) == ["model.quantization: nf4 here, none there"]
    assert measured_differently(plain, nf4) == ["model.quantization: none here, nf4 there"]
    assert measured_differently(nf4, nf4) == measured_differently(none, plain) == []


def test_statistics_of_a_stream_are_others(load):
    text = MINIMAL.replace("sequence-classification", "causal-lm").replace("glue:cola", "wikitext")
    plain, streamed, other = (
        measurement_key(load(text, "max_steps=5", "train.learning_rate=1e-3", *given))
        for given in ([], ["streaming=true"], ["streaming=true", "shuffle_buffer=9"])
    )
    assert not plain.keys() & {"data.streaming", "data.shuffle_buffer"}, "as older versions measured"
    assert measured_differently(streamed, plain) == ["data.streaming: true here, false there"]
    assert measured_differently(other, streamed) == ["data.shuffle_buffer: 9 here, 10000 there"]
    assert measured_differently(plain, plain) == measured_differently(streamed, streamed) == []
    less_evaluated = load(text, "max_steps=9", "train.learning_rate=1e-2", "streaming=true", "evaluation_examples=7")
    assert measurement_key(less_evaluated) == streamed


@pytest.mark.parametrize("groups", ["element", "row"])
def test_statistics_serve_either_way_of_valuing_groups(load, groups):
    keys = [measurement_key(load(MINIMAL, f"groups={groups}", f"joint={joint}")) for joint in ("auto", "true", "false")]
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("place", ["data.train", "model.name"])
def test_statistics_of_other_contents_are_others(load, place):
    contents = {"data.train": "a", "model.name": "b", "data.evaluation": "c"}
    assert measurement_key(load(), {**contents, place: "d"}) != measurement_key(load(), contents)
    assert measurement_key(load(), {**contents, "data.evaluation": "d"}) == measurement_key(load(), contents)


def test_measurement_key_names_known_keys_and_is_plain(load):
    key = measurement_key(load())
    assert set(key) <= set(KEYS)
    assert json.loads(json.dumps(key)) == key


def test_differences(load):
    here, there = load(), load(MINIMAL, "budget=1%", "exclude=*emb*", "seed=4")
    assert differences(here, there) == [
        "select.budget: 0.5% here, 1% there",
        "select.exclude: [] here, ['*emb*'] there",
        "seed: 0 here, 4 there",
    ]
    assert differences(here, here) == []


def test_parse_config_names_its_source():
    with pytest.raises(AdapeftError, match=r"subset.safetensors has 5 problems:\n  model.name: required"):
        parse_config({}, source="subset.safetensors")
