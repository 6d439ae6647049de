"""Tests that a trial of the examples refuses exactly those on which the model with weights crashes."""

from __future__ import annotations

import datasets
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    LongformerConfig,
    MixtralConfig,
    MPNetConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    ReformerConfig,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

from adapeft.data.description import DataDescription
from adapeft.errors import AdapeftError
from adapeft.model.load import build_structure
from adapeft.model.trial import Trial
from adapeft.model.unloaded.weightless import Weightless
from adapeft.tasks.registry import TASKS
from adapeft.tasks.sequence_classification import ClassificationData

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = [*SPECIAL, *(f"w{number}" for number in range(36))]
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "vocab_size": len(WORDS)}
BERT = IDS | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
SEQ2SEQ = {"decoder_start_token_id": 2, "forced_eos_token_id": 2}
BART = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(
    ("encoder_attention_heads", "decoder_attention_heads"), 2
)
P = 34
TABLE = {"max_position_embeddings": P}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

CLASSIFIERS = {
    "bert": (BertConfig(**BERT, **TABLE), P),
    "electra": (ElectraConfig(**BERT, **TABLE, embedding_size=8), P),
    "albert": (AlbertConfig(**BERT, **TABLE, embedding_size=8), P),
    "distilbert": (DistilBertConfig(**IDS, **TABLE, dim=16, n_layers=2, n_heads=2, hidden_dim=20), P),
    "roberta": (RobertaConfig(**BERT, **TABLE, type_vocab_size=1), P - 2),
    "xlm-roberta": (XLMRobertaConfig(**BERT, **TABLE, type_vocab_size=1), P - 2),
    "mpnet": (MPNetConfig(**BERT, **TABLE), P - 2),
    "longformer": (LongformerConfig(**BERT, **TABLE, attention_window=4), P - 2),
    "deberta": (DebertaV2Config(**BERT, **TABLE, **DEBERTA), P),
    "deberta, relative alone": (DebertaV2Config(**BERT, **TABLE, **DEBERTA, position_biased_input=False), None),
    "gpt2": (GPT2Config(**IDS, n_positions=P, n_embd=16, n_layer=2, n_head=2), P),
    "bart": (BartConfig(**IDS, **BART, **SEQ2SEQ, **TABLE, d_model=16, encoder_ffn_dim=20, decoder_ffn_dim=20), P),
    "t5": (T5Config(**IDS, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2, decoder_start_token_id=1), None),
}
LANGUAGE_MODELS = {
    "gpt2": (GPT2Config(**IDS, n_positions=P, n_embd=16, n_layer=2, n_head=2), P),
    "gpt-neo": (
        GPTNeoConfig(**IDS, **TABLE, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]),
        P,
    ),
    "opt": (
        OPTConfig(
            **IDS,
            **TABLE,
            hidden_size=16,
            ffn_dim=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        ),
        P,
    ),
    "llama": (LlamaConfig(**BERT, **TABLE), None),
    "bloom": (BloomConfig(**IDS, hidden_size=16, n_layer=2, n_head=2), None),
    "mixtral": (MixtralConfig(**BERT, **TABLE, num_key_value_heads=2, num_local_experts=4), None),
}
QUICK = ("roberta", "bart", "gpt2", "llama")
CASES = [
    pytest.param(task, config, limit, id=f"{task} {name}", marks=() if name in QUICK else pytest.mark.slow)
    for task, configs in (("sequence-classification", CLASSIFIERS), ("causal-lm", LANGUAGE_MODELS))
    for name, (config, limit) in configs.items()
]
AUTO = {"sequence-classification": AutoModelForSequenceClassification, "causal-lm": AutoModelForCausalLM}


def tokenizer_of(words=WORDS, **options):
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A:0 $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names | options)


def sample_of(texts, max_length, task="sequence-classification", pairs=None, tokenizer=None):
    columns = {"text": texts, "label": [index % 2 for index in range(len(texts))]}
    columns |= {} if pairs is None else {"pair": pairs}
    data = ClassificationData(
        train="a", evaluation="b", text="text", text_pair=None if pairs is None else "pair", max_length=max_length
    )
    description = DataDescription(len(texts), 1, None, problem_type="single_label_classification", num_labels=2)
    return TASKS[task].tokenize(datasets.Dataset.from_dict(columns), data, tokenizer or tokenizer_of(), description)


def check(config, task, sample, max_length, largest=("data.train", 39)):
    config.num_labels = 2
    weightless = Weightless()
    with weightless:
        model = build_structure(config, task)
    Trial(model, weightless, sample).check(max_length, lambda: largest)


def crashes(config, task, sample):
    """Whether the model with weights crashes on the longest and the shortest of the examples."""
    torch.manual_seed(0)
    model = AUTO[task].from_config(config).train()
    longest, shortest = (sample.lengths.index(length) for length in (max(sample.lengths), min(sample.lengths)))
    try:
        model(**sample.collate([longest, shortest]).inputs)
    except (IndexError, RuntimeError, ValueError):
        return True
    return False


@pytest.mark.parametrize(("task", "config", "limit"), CASES)
def test_lengths_are_refused_where_the_model_crashes(task, config, limit):
    texts = ["w1 w2 w3", " ".join(f"w{number % 36}" for number in range(200))]
    for length in (3 * P,) if limit is None else (limit, limit + 1):
        sample = sample_of(texts, length, task)
        is_too_long = limit is not None and length > limit
        assert crashes(config, task, sample) is is_too_long, length
        if is_too_long:
            with pytest.raises(
                AdapeftError, match=rf"data.max_length = {length}: the model has {limit} positions. Lower it"
            ):
                check(config, task, sample, length)
        else:
            check(config, task, sample, length)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "config", "limit"), CASES)
def test_short_texts_are_held_against_the_longest_that_may_come(task, config, limit):
    """The same model and max_length are judged alike, whatever the first texts are."""
    sample = sample_of(["w1 w2 w3", "w1 w2", "w4 w5 w6 w7"] * 9, P - 3 if task == "causal-lm" else 3 * P, task)
    if limit is None:
        check(config, task, sample, 3 * P)
    else:
        with pytest.raises(AdapeftError, match=f"the model has {limit} positions"):
            check(config, task, sample, 3 * P)


@pytest.mark.parametrize(("task", "config", "limit"), CASES)
def test_tokens_that_the_model_does_not_have(task, config, limit):
    """They are in the examples, elsewhere in the data, or only in the tokenizer, which is not an error."""
    larger = tokenizer_of([*WORDS, "new", "newer"])
    seen = sample_of(["w1 w2 w3", "w1 new w2 w4"] * 9, 8, task, tokenizer=larger)
    unseen = sample_of(["w1 w2 w3", "w1 w2 w4 w5"] * 9, 8, task, tokenizer=larger)
    assert crashes(config, task, seen)
    assert not crashes(config, task, unseen)
    with pytest.raises(AdapeftError, match=r"maps 'new' to id 40, but the model has 40 embeddings"):
        check(config, task, seen, 8)
    with pytest.raises(AdapeftError, match=r"data.evaluation: the tokenizer of model.name maps 'newer' to id 41"):
        check(config, task, unseen, 8, ("data.evaluation", 41))
    check(config, task, unseen, 8, ("data.train", 39))


def test_a_padding_token_that_was_added():
    tokenizer = tokenizer_of()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    sample = sample_of(["w1", "w1 w2 w3"], 8, tokenizer=tokenizer)
    config = CLASSIFIERS["bert"][0]
    assert crashes(config, "sequence-classification", sample)
    with pytest.raises(AdapeftError, match=r"maps '\[PAD\]', its padding token, to id 40, but the model has 40 emb"):
        check(config, "sequence-classification", sample, 8)


@pytest.mark.parametrize(("name", "is_refused"), [("roberta", True), ("bert", False)])
def test_token_types_that_the_model_does_not_have(name, is_refused):
    config = CLASSIFIERS[name][0]
    tokenizer = tokenizer_of(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    sample = sample_of(["w1 w2", "w3"], 16, pairs=["w4", "w5 w6 w7"], tokenizer=tokenizer)
    assert crashes(config, "sequence-classification", sample) is is_refused
    if not is_refused:
        return check(config, "sequence-classification", sample, 16)
    with pytest.raises(AdapeftError, match=r"gives token type 1 .* but the model has 1 \(roberta.embeddings.tok"):
        check(config, "sequence-classification", sample, 16)


def test_what_the_models_own_code_refuses():
    """BART classifies by the state of the end-of-text token; every example has one."""
    tokenizer = tokenizer_of()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$A </s> $B", special_tokens=[("</s>", 2)]
    )
    sample = sample_of(["w1 </s> w2", "w1 w2 w3 w4"], 16, tokenizer=tokenizer)
    config = CLASSIFIERS["bart"][0]
    assert crashes(config, "sequence-classification", sample)
    with pytest.raises(AdapeftError, match=r"model\.name: the model rejects these examples: All examples must have"):
        check(config, "sequence-classification", sample, 16)
    reformer = ReformerConfig(vocab_size=40, pad_token_id=1, axial_pos_shape=[4, 4], is_decoder=False)
    assert crashes(reformer, "sequence-classification", sample)
    with pytest.raises(AdapeftError, match=r"rejects these examples: If training, make sure that config\.axial"):
        check(reformer, "sequence-classification", sample, 16)


def test_a_pass_that_takes_too_long_refuses_nothing():
    config, _ = CLASSIFIERS["bert"]
    sample = sample_of(["w1 w2 w3"], 8)
    weightless = Weightless()
    with weightless:
        model = build_structure(config, "sequence-classification")
    trial = Trial(model, weightless, sample, most_operations=3)
    trial.check(34, lambda: ("data.train", 0))
    with pytest.raises(AdapeftError, match="the model has 34 positions"):  # the size of its position table
        trial.check(35, lambda: ("data.train", 0))
