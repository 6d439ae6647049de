"""Losses and sampled labels in pieces, against all logits at once in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from adapeft.config.load import parse_select
from adapeft.data.description import Batch
from adapeft.errors import AdapeftError
from adapeft.measure.groups import groups_of
from adapeft.measure.low_rank.windows import Windows
from adapeft.parts.elements import Elements
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tasks.inference import infer_objective
from adapeft.tasks.losses import pieces
from adapeft.tasks.losses.cross_entropy import NextToken, TokenCrossEntropy
from adapeft.tasks.losses.objective import IGNORED
from adapeft.tasks.losses.own_loss import check_own_loss
from adapeft.tasks.losses.split import split_of
from adapeft.tune.attach import attach
from tests.oracles.measuring import in_double
from tests.oracles.parts import make_llama
from tests.support.tiny import VOCABULARY, make_bart, make_gpt2, make_t5, make_whisper

NUM_EXAMPLES, NUM_TOKENS, PIECE = 4, 9, 5
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 12}
BLOCKS = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 19, "pad_token_id": 0}
IDS = torch.randint(3, VOCABULARY, (NUM_EXAMPLES, NUM_TOKENS), generator=torch.Generator().manual_seed(3))
LABELS = IDS.clone()
LABELS[0, :4] = IGNORED  # a prompt
LABELS[1] = IGNORED  # an example that predicts nothing
LABELS[2, -3:] = IGNORED  # padding
MASK = torch.ones_like(IDS)
MASK[2, -3:] = 0
BATCH = Batch({"input_ids": IDS, "attention_mask": MASK}, LABELS, torch.tensor([3, 700, 12, 0]))


def from_config(config) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


class Smoothed(GPT2LMHeadModel):
    """Its logits depend on those of the positions before."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.cumsum(1)
        return output


class Unlike(nn.Module):
    """A model that is not one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(VOCABULARY, 7), nn.Linear(7, VOCABULARY)

    def forward(self, input_ids, attention_mask):
        return CausalLMOutput(logits=self.out(self.embedding(input_ids)))


SPLIT = {
    "gpt2": (make_gpt2, "transformer"),
    "llama": (make_llama, "model"),
    "gemma2": (lambda: from_config(Gemma2Config(**BLOCKS, head_dim=6, final_logit_softcapping=2.0)), "model"),
    "cohere": (lambda: from_config(CohereConfig(**BLOCKS, logit_scale=0.3)), "model"),
    "mixtral": (
        lambda: from_config(MixtralConfig(**BLOCKS, num_local_experts=3, experts_implementation="eager")),
        "model",
    ),
    "opt": (lambda: from_config(OPTConfig(**SIZES, ffn_dim=19, word_embed_proj_dim=8)), "model.decoder"),
    "bloom": (
        lambda: from_config(BloomConfig(vocab_size=VOCABULARY, hidden_size=12, n_layer=2, n_head=2)),
        "transformer",
    ),
    "t5": (make_t5, "decoder"),
    "bart": (make_bart, "model"),
}


def smoothed() -> Smoothed:
    model = make_gpt2()
    model.__class__ = Smoothed
    return model


WHOLE = {"of-earlier-positions": smoothed, "other": Unlike}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * VOCABULARY * PIECE)


def objective_of(model) -> TokenCrossEntropy:
    return infer_objective(model, LABELS)


def whole_loss(model, batch=BATCH, seed=None):
    """Return the loss of all logits at once, and the labels."""
    objective = objective_of(model)
    logits = objective.forward(model, batch)
    labels = batch.labels if seed is None else objective.sample_labels(logits, batch, seed)
    return objective.loss_sum(logits, labels), labels


def gradients(model, loss, retain_graph=False) -> dict[str, torch.Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=retain_graph)
    return dict(zip(trained, found, strict=True))


def assert_same(found, expected) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-12, msg=lambda said, name=name: name + said
        )


@pytest.mark.parametrize("seed", [None, 1], ids=["true", "sampled"])
@pytest.mark.parametrize("case", [*SPLIT, *WHOLE])
def test_loss_and_gradients_are_those_of_all_logits_at_once(case, seed):
    make = SPLIT[case][0] if case in SPLIT else WHOLE[case]
    model = in_double(make())
    expected, _ = whole_loss(model, seed=seed)
    found = objective_of(model).loss(model, BATCH, sample_seed=seed)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert_same(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize("case", SPLIT)
def test_only_a_piece_of_the_logits_is_computed_at_a_time(case):
    make, body = SPLIT[case]
    model = make().eval()
    rows, in_total = [], []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(output.shape[:-1].numel())
    )
    objective = objective_of(model)
    split, number = split_of(model, LABELS.numel())
    assert split.body == body
    rows.clear()
    objective.loss(model, BATCH).backward()
    in_total = sum(rows)
    predicted = objective.num_predictions(LABELS)
    assert max(rows) <= PIECE
    assert len(rows) == 1 + 2 * number, "once for the body, and each piece in both passes"
    assert in_total == NUM_EXAMPLES + 2 * predicted, "only positions with a label have logits"


@pytest.mark.parametrize("case", SPLIT)
def test_the_output_layer_reads_states_without_gaps(case):
    """Given a strided batch, torch copies a frozen weight once for every example."""
    model, seen = SPLIT[case][0]().eval(), []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    objective_of(model).loss(model, BATCH)
    assert len(seen) > 1
    assert all(seen)


@pytest.mark.parametrize("case", [*SPLIT, *WHOLE])
def test_losses_at_true_and_sampled_labels_share_a_forward_pass(case):
    model = in_double((SPLIT[case][0] if case in SPLIT else WHOLE[case])())
    objective, seeds = objective_of(model), (None, 7)
    split_of(model, LABELS.numel())  # tries it out
    calls = []
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    embedding.register_forward_hook(lambda *args: calls.append(1))
    alone = [objective.loss(model, BATCH, sample_seed=seed) for seed in seeds]
    calls_alone = len(calls)
    both = objective.losses(model, BATCH, seeds)
    assert 2 * (len(calls) - calls_alone) == calls_alone
    for index, (one, expected) in enumerate(zip(both, alone, strict=True)):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=0)
        assert_same(gradients(model, one, retain_graph=not index), gradients(model, expected))


@pytest.mark.parametrize("case", WHOLE)
def test_other_models_are_not_split(case):
    assert split_of(WHOLE[case](), 10**6) is None


@pytest.mark.parametrize("case", [*SPLIT, *WHOLE])
def test_a_model_that_is_not_split_is_remarked_unless_its_logits_are_one_piece(case, monkeypatch):
    model = (SPLIT[case][0] if case in SPLIT else WHOLE[case])()
    found = objective_of(model).remark(model, BATCH)
    assert (found is None) == (case in SPLIT or not isinstance(model, PreTrainedModel))
    if found is not None:
        assert f"the logits of all {LABELS.numel()} positions" in found
        monkeypatch.setattr(pieces, "PIECE_BYTES", 2**26)
        assert objective_of(model).remark(model, BATCH) is None


def test_a_speech_model_is_not_split():
    """It would need features to be tried on."""
    assert split_of(make_whisper(), 10**6) is None


def test_what_fits_into_one_piece_is_not_split(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4 * VOCABULARY * NUM_EXAMPLES * NUM_TOKENS)
    assert split_of(make_gpt2(), NUM_EXAMPLES * NUM_TOKENS) is None
    assert split_of(make_gpt2(), NUM_EXAMPLES * NUM_TOKENS + 1) is not None


def test_trying_a_split_leaves_the_model_as_it_was():
    model = make_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    names = [name for name, _ in model.named_modules()]
    assert split_of(model, 10**6) is not None
    objective_of(model).loss(model, BATCH).backward()
    assert [module.training for module in model.modules()] == modes
    assert [name for name, _ in model.named_modules()] == names
    assert "forward" not in vars(model)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_example_losses_are_those_of_the_examples_alone(make):
    model = in_double(make())
    losses = NextToken().example_losses(model, BATCH)
    alone = [whole_loss(model, BATCH.example(row))[0] for row in range(NUM_EXAMPLES)]
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_predictions", [0, 1, 4])
def test_every_rank_calls_the_tail_equally_often(num_predictions):
    """Under ZeRO-3 a call is collective: a rank with few predictions, or none, runs as many pieces as the largest."""
    labels = torch.full_like(LABELS, IGNORED)
    labels[0, 3 : 3 + num_predictions] = 4
    model = in_double(make_llama())
    few = Batch(BATCH.inputs, labels, BATCH.ids)
    expected, _ = whole_loss(model, few)
    assert split_of(model, 10**6) is not None
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    found = NextToken().loss(model, few, num_labels=10 * PIECE)
    assert rows == [NUM_EXAMPLES] + [1] * 10
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert_same(gradients(model, found), gradients(model, expected))


def subset_of(model) -> Subset:
    """Return a subset of the embeddings, which are the output layer too where they are tied, and of other tensors."""
    parts = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if "embed_tokens" in name or "wte" in name:
            parts[name] = Rows(shape, torch.tensor([0, 4, 7]), 0)
        elif "lm_head" in name:
            parts[name] = Elements(shape, torch.arange(0, parameter.numel(), 5))
        elif "norm" in name or "ln_" in name:
            parts[name] = Whole(shape)
    return Subset(parts)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [make_gpt2, make_llama], ids=["tied", "untied"])
def test_leaves_get_the_same_gradients(make, checkpointing):
    model = attach(make(), subset_of(make())).double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        module.p = 0.0 if isinstance(module, nn.Dropout) else vars(module).get("p")
    model.train(checkpointing)
    expected, _ = whole_loss(model)
    found = NextToken().loss(model, BATCH)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert_same(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize("make", [make_gpt2, make_llama], ids=["tied", "untied"])
def test_windows_get_the_same_gradients(make):
    model = make().eval()
    Windows(model, groups_of(model, parse_select({"budget": "10%", "groups": "row"})), 3, seed=1)
    model.double()
    expected, _ = whole_loss(model, seed=4)
    found = NextToken().loss(model, BATCH, sample_seed=4)
    assert_same(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize("make", [make_gpt2, make_t5])
def test_bfloat16(make):
    """The loss is that of logits rounded to bfloat16, summed in float32."""
    model = make().eval().bfloat16()
    expected, _ = whole_loss(model)
    found = objective_of(model).loss(model, BATCH)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_a_label_that_is_no_output_is_refused():
    labels = LABELS.clone()
    labels[3, 4] = VOCABULARY
    with pytest.raises(AdapeftError, match="the model cannot take a batch of examples 3, 700, 12, 0"):
        NextToken().loss(make_llama(), Batch(BATCH.inputs, labels, BATCH.ids))


def test_the_models_own_loss_is_checked_on_an_excerpt():
    model = make_llama().eval()
    rows = []
    assert split_of(model, 10**6) is not None
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    ids = IDS.repeat(1, 5)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, BATCH.ids)
    check_own_loss(NextToken(), batch, model)
    assert rows == [17, 17], "one example, up to 16 tokens after its first label"
    model.loss_function = lambda logits, labels, **kwargs: logits.logsumexp(-1).mean()
    with pytest.raises(AdapeftError, match="the loss that LlamaForCausalLM computes for the first batch"):
        check_own_loss(NextToken(), batch, model)


def test_an_excerpt_has_predictions():
    ids = IDS.repeat(1, 5)
    labels = ids.clone()
    labels[:3] = IGNORED
    labels[3, :30] = IGNORED
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, BATCH.ids)
    part = NextToken().excerpt(make_llama(), batch)
    assert part.ids.tolist() == [0]
    assert torch.equal(part.inputs["input_ids"], ids[3:, :45])
    assert NextToken().num_predictions(part.labels)
