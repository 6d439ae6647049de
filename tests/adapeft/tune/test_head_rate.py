"""The learning rate of a new head, from the size of its inputs."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import adapeft
from adapeft.errors import AdapeftError
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from tests.support.tiny import make_bert

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
    "num_labels": 3,
}


def attached(model, new):
    name = next(name for name, parameter in model.named_parameters() if "attention.output.dense.weight" in name)
    return adapeft.attach(model, Subset({name: Whole(tuple(model.get_parameter(name).shape))}, new, new))


def batch_of(*texts, side="right"):
    length = max(map(len, texts))
    pads = [[0] * (length - len(text)) for text in texts]
    rows = [[*text, *pad] if side == "right" else [*pad, *text] for text, pad in zip(texts, pads, strict=True)]
    masks = [
        [1] * len(text) + pad if side == "right" else pad + [1] * len(text)
        for text, pad in zip(texts, pads, strict=True)
    ]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def test_a_step_moves_the_outputs_of_the_head_by_a_fixed_amount():
    torch.manual_seed(0)
    model = attached(make_bert(), ("classifier.weight", "classifier.bias")).train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    batches = [batch_of([5, 6, 7], [8, 9]), batch_of([10, 11])]
    rate = adapeft.head_learning_rate(model, batches)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    with torch.no_grad():
        pooled = torch.cat([model.bert(**batch).pooler_output for batch in batches])
    assert rate == pytest.approx(0.6 / float(pooled.abs().sum(1).mean()))
    groups = adapeft.parameter_groups(model, 1e-3, 0.0, rate)
    assert {group["lr"] for group in groups if group.get("is_head")} == {rate}


def test_padding_changes_nothing():
    torch.manual_seed(0)
    config = BertConfig(**SMALL, position_embedding_type="relative_key")
    model = attached(BertForTokenClassification(config).eval(), ("classifier.weight", "classifier.bias"))
    texts = ([5, 6, 7, 8, 9, 10], [11, 12], [13])
    alone = adapeft.head_learning_rate(model, [batch_of(text) for text in texts])
    assert adapeft.head_learning_rate(model, [batch_of(*texts)]) == pytest.approx(alone)
    with torch.no_grad():
        states = [model.bert(**batch_of(text)).last_hidden_state[0] for text in texts]
    assert alone == pytest.approx(0.6 / float(torch.cat(states).abs().sum(1).mean()))


def test_the_largest_inputs_of_a_head_of_several_layers_count():
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**SMALL)).eval()
    new = tuple(name for name, _ in model.named_parameters() if name.startswith("classifier."))
    batch = batch_of([5, 6, 7], [8, 9])
    with torch.no_grad():
        first = model.roberta(**batch).last_hidden_state[:, 0]
        second = torch.tanh(model.classifier.dense(first))
    sizes = [float(x.abs().sum(1).mean()) for x in (first, second)]
    assert sizes[0] > 2 * sizes[1]
    assert adapeft.head_learning_rate(attached(model, new), [batch]) == pytest.approx(0.6 / sizes[0])


def test_a_model_without_a_new_head_is_refused():
    model = attached(make_bert(), ())
    with pytest.raises(AdapeftError, match="the attached subset has no new linear layer"):
        adapeft.head_learning_rate(model, [batch_of([5, 6])])


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_inputs_from_which_no_rate_follows_are_refused(value):
    model = attached(make_bert(), ("classifier.weight", "classifier.bias"))
    torch.nn.init.constant_(model.bert.pooler.dense.weight, value)
    torch.nn.init.zeros_(model.bert.pooler.dense.bias)
    with pytest.raises(AdapeftError, match=r"inputs of 'classifier.weight' is (0|nan), from which no rate follows"):
        adapeft.head_learning_rate(model, [batch_of([5, 6])])
