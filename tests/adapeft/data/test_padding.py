"""Padding does not change logits, alone and in a batch, in float64, for any padding in config and tokenizer."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    FNetConfig,
    FNetModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
    XLNetModel,
)

from adapeft.data.description import DataDescription
from adapeft.data.padding import set_padding, with_padding
from adapeft.deltas.extract import extract_delta
from adapeft.deltas.merge import merge
from adapeft.errors import AdapeftError
from adapeft.model.load import label_options, load_model_config, load_tokenizer
from adapeft.model.section import Model
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tasks.losses.cross_entropy import Classification
from adapeft.tasks.losses.own_loss import check_padding
from adapeft.tasks.registry import TASKS
from adapeft.tasks.sequence_classification import ClassificationData
from adapeft.tune.attach import attach

SIZE = 40
SMALL = {
    "vocab_size": SIZE, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 19,
    "max_position_embeddings": 32,
}  # fmt: skip
EOS = 2
TASK = "sequence-classification"


def bert(**padding):
    return BertModel(BertConfig(**SMALL, **padding))


def roberta(**padding):
    return RobertaModel(RobertaConfig(**SMALL, **padding))


def llama(**padding):
    return LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=3, **padding))


def gpt2(**padding):
    return GPT2Model(GPT2Config(vocab_size=SIZE, n_positions=32, n_embd=12, n_layer=2, n_head=3, **padding))


def xlnet(**padding):
    return XLNetModel(XLNetConfig(vocab_size=SIZE, d_model=12, n_layer=2, n_head=3, d_inner=19, **padding))


def save_tokenizer(folder: Path, side: str, pad: str | None, extra: int = 0) -> None:
    """Save a tokenizer of the words t0 … t39, and ``extra`` more for which the model has no embedding."""
    words = {f"t{number}": number for number in range(SIZE + extra)}
    core = Tokenizer(models.WordLevel(words, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"unk_token": "t0", "eos_token": f"t{EOS}"} | ({} if pad is None else {"pad_token": pad})
    PreTrainedTokenizerFast(tokenizer_object=core, padding_side=side, **named).save_pretrained(folder)


def texts(ends_in_eos: bool) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (16,), generator=generator).tolist()
    found = [" ".join(f"t{n}" for n in torch.randint(8, SIZE, (size,), generator=generator)) for size in lengths]
    return [f"{text} t{EOS}" for text in found] if ends_in_eos else found


PROBLEM = {True: "regression", False: "single_label_classification"}


def loaded(folder: Path, num_labels: int = 3, is_regression: bool = False):
    """Return the classifier in float64 as a run loads it, its tokenizer and the description of the data."""
    model = Model(name=str(folder), task=TASK)
    description = DataDescription(16, 16, None, PROBLEM[is_regression], num_labels)
    tokenizer = load_tokenizer(model)
    config = load_model_config(model, description, tokenizer)
    torch.manual_seed(0)
    return at_work(AutoModelForSequenceClassification.from_pretrained(folder, config=config)), tokenizer, description


def at_work(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def difference(model, tokenized) -> float:
    """Return the largest relative difference between logits of examples alone and in one batch."""
    together = model(**tokenized.collate(range(len(tokenized))).inputs).logits
    alone = torch.cat([model(**tokenized.collate([index]).inputs).logits for index in range(len(tokenized))])
    assert together.std() > 1e-3, "the logits depend on the texts"
    return ((together - alone).abs().max() / together.abs().max()).item()


# Rounding: sums of fewer than 200 float64 terms through two layers.
BOUND = 1e-11

MAKERS = {"bert": bert, "roberta": roberta, "llama": llama, "gpt2": gpt2, "xlnet": xlnet}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("maker", "config_pad", "pad", "extra"),
    [
        ("bert", 0, "t0", 0),
        ("bert", 0, "t5", 0),
        ("roberta", 1, "t5", 0),
        ("llama", 0, None, 0),
        ("llama", None, None, 0),
        ("llama", None, "t5", 0),
        ("llama", 5, "t6", 0),
        ("llama", -1, None, 0),
        ("llama", EOS, f"t{EOS}", 0),
        ("llama", None, f"t{SIZE}", 1),
        ("gpt2", None, None, 0),
        ("gpt2", None, f"t{EOS}", 0),
        ("gpt2", 7, f"t{EOS}", 0),
        ("xlnet", 5, "t5", 0),
        ("xlnet", 5, None, 0),
    ],
)
def test_no_batch_changes_a_classification(tmp_path, maker, config_pad, pad, extra, side):
    torch.manual_seed(0)
    MAKERS[maker](pad_token_id=config_pad).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, side, pad, extra)
    model, tokenizer, description = loaded(tmp_path)
    data = ClassificationData(train="a", evaluation="a", max_length=16)
    for ends_in_eos in (False, True):
        rows = datasets.Dataset.from_dict({"text": texts(ends_in_eos), "label": [0] * 16})
        assert difference(model, TASKS[TASK].tokenize(rows, data, tokenizer, description)) < BOUND


def test_no_batch_changes_a_regression(tmp_path):
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "left", None)
    model, tokenizer, description = loaded(tmp_path, num_labels=1, is_regression=True)
    rows = datasets.Dataset.from_dict({"text": texts(False), "label": [0.5] * 16})
    tokenized = TASKS[TASK].tokenize(
        rows, ClassificationData(train="a", evaluation="a", max_length=16), tokenizer, description
    )
    assert difference(model, tokenized) < BOUND


def test_examples_of_a_language_model_need_no_padding(tmp_path):
    save_tokenizer(tmp_path, "left", None)
    gpt2().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(Model(name=str(tmp_path), task="causal-lm"))
    rows = datasets.Dataset.from_dict({"text": texts(False)})
    tokenized = TASKS["causal-lm"].tokenize(
        rows, ClassificationData(train="a", evaluation="a", max_length=8), tokenizer
    )
    assert tokenized.collate(range(len(tokenized))).inputs["attention_mask"].all()


def test_a_text_of_padding_alone(tmp_path):
    """Where every token is padding, models like GPT-2 read the first position."""
    llama(pad_token_id=EOS).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, "left", None)
    model, tokenizer, description = loaded(tmp_path)
    rows = datasets.Dataset.from_dict({"text": [f"t{EOS}", f"t{EOS} t{EOS}", *texts(False)], "label": [0] * 18})
    data = ClassificationData(train="a", evaluation="a", max_length=16)
    assert difference(model, TASKS[TASK].tokenize(rows, data, tokenizer, description)) < BOUND


def test_the_padding_of_the_config_decides(tmp_path):
    save_tokenizer(tmp_path, "left", "t6", extra=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for config_pad, expected in ((5, 5), (None, 6), (-1, 6), (SIZE, 6), (SIZE + 100, 6)):
        config = LlamaConfig(**SMALL)
        config.pad_token_id = config_pad
        padding = with_padding(tokenizer, config)
        set_padding(config, padding)
        assert config.pad_token_id == padding.pad_token_id == expected
        assert padding.padding_side == "right"
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("t6", "left"), "the caller's is left as it is"


@pytest.mark.parametrize(
    ("maker", "config_pad", "pad", "side"),
    [(llama, 0, None, "left"), (llama, 5, "t6", "right"), (gpt2, None, None, "left"), (gpt2, 7, f"t{EOS}", "right")],
)
def test_what_is_merged_classifies_alike_in_any_batch(tmp_path, maker, config_pad, pad, side):
    """In plain transformers, the tokenizer next to the merged weights pads as their config expects."""
    torch.manual_seed(0)
    maker(pad_token_id=config_pad).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", side, pad)
    model = Model(name=str(tmp_path / "base"), task=TASK)
    description = DataDescription(16, 16, None, "single_label_classification", 3)
    config = load_model_config(model, description, load_tokenizer(model))
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", config=config)
    name = next(name for name, parameter in trained.named_parameters() if "norm" in name or "ln_f" in name)
    attach(trained, Subset({name: Whole((12,))}, ("score.weight",), ("score.weight",)))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    said = {"name": model.name, "task": TASK, "labels": label_options(TASK, description)}
    merge(extract_delta(trained, {"model": said}), model.name, tmp_path / "merged")

    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    examples = texts(False)
    with torch.no_grad():
        together = merged(**tokenizer(examples, padding=True, return_tensors="pt")).logits
        alone = torch.cat([merged(**tokenizer([text], return_tensors="pt")).logits for text in examples])
        as_trained = trained.double().eval()(**tokenizer(examples, padding=True, return_tensors="pt")).logits
    assert ((together - alone).abs().max() / together.abs().max()).item() < BOUND
    assert ((together - as_trained).abs().max() / together.abs().max()).item() < 1e-6, "float32 weights, merged once"


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_a_model_that_reads_its_padding_needs_batches_of_one_length(padding, tmp_path):
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")}
    save_tokenizer(tmp_path, "right", "t0")
    FNetModel(FNetConfig(**sizes, max_position_embeddings=32, pad_token_id=0)).save_pretrained(tmp_path)
    model, tokenizer, description = loaded(tmp_path)
    rows = datasets.Dataset.from_dict({"text": texts(ends_in_eos=False), "label": [0, 1] * 8})
    data = ClassificationData(train="x", evaluation="x", max_length=16, padding=padding)
    tokenized = TASKS[TASK].tokenize(rows, data, tokenizer, description)
    order = sorted(range(16), key=lambda index: tokenized.lengths[index])
    alone, batched = tokenized.collate(order[:1]), tokenized.collate([order[0], order[-1]])
    if padding == "longest":
        with pytest.raises(AdapeftError, match=r"FNet.* different logits .* Set data\.padding: max_length"):
            check_padding(Classification(), alone, batched, model)
    else:
        check_padding(Classification(), alone, batched, model)
        assert alone.inputs["input_ids"].shape == (1, 16)
        assert difference(model, tokenized) < BOUND
