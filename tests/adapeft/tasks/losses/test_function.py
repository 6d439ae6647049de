"""Tests of losses given as functions: their curvature is the exact one, and what is no such function is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adapeft
from adapeft.errors import AdapeftError
from adapeft.tasks.losses.function import FunctionLoss
from tests.oracles.measuring import check_curvature, in_double
from tests.support.tiny import VOCABULARY, make_batches, make_gpt2

BETA = 0.3


def preferences(num_batches: int = 4, num_pairs: int = 3) -> list[dict[str, Tensor]]:
    """Return batches as of TRL's DataCollatorForPreference: the chosen answers, then the rejected ones."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(num_batches):
        tokens = torch.randint(3, VOCABULARY, (2 * num_pairs, 6), generator=generator)
        mask = torch.ones_like(tokens)
        mask[:, :2] = 0
        references = torch.randn(2, num_pairs, generator=generator, dtype=torch.float64) - 12
        names = ("ref_chosen_logps", "ref_rejected_logps")
        batches.append({"input_ids": tokens, "completion_mask": mask, **dict(zip(names, references, strict=True))})
    return batches


def margins(model, batch: dict[str, Tensor]) -> Tensor:
    """Return β times the difference of the log ratios of every pair."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    tokens, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    chosen, rejected = (logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0] * mask).sum(1).chunk(2)
    return BETA * (chosen - batch["ref_chosen_logps"] - rejected + batch["ref_rejected_logps"])


def dpo(model, batch, generator=None) -> Tensor:
    margin = margins(model, batch)
    preferred = torch.ones_like(margin) if generator is None else torch.bernoulli(margin.sigmoid(), generator=generator)
    return F.binary_cross_entropy_with_logits(margin, preferred, reduction="none")


def test_dpo_has_the_exact_gauss_newton_form_as_mean():
    """H = p (1 - p) of every pair, in float64, with another model as reference, so that p is no constant."""
    model = in_double(make_gpt2())
    model.set_attn_implementation("eager")  # the fused kernel has no forward derivative
    function = FunctionLoss(dpo)
    batch = function.batch(model, preferences()[0], 0)
    assert function.num_predictions(batch.labels) == 3

    def exact(margin: Tensor, change: Tensor) -> float:
        p = margin.sigmoid()
        assert p.std() > 0.05
        return float((p * (1 - p) * change**2).mean())

    def loss(seed: int) -> Tensor:
        return function.loss(model, batch, sample_seed=seed)

    check_curvature(model, lambda model: margins(model, batch.inputs), exact, loss, 3)
    true = function.loss(model, batch)
    torch.testing.assert_close(true, -F.logsigmoid(margins(model, batch.inputs)).sum())


def test_draws_depend_on_the_seed_and_the_batch_alone():
    model, function = make_gpt2(), FunctionLoss(dpo)
    first, second = (function.batch(model, batch, index) for index, batch in enumerate(preferences()[:2]))

    def drawn(batch, seed) -> Tensor:
        return function.loss(model.eval(), batch, sample_seed=seed).detach()

    again = drawn(first, 1)
    torch.rand(3)
    drawn(second, 1)
    assert torch.equal(drawn(first, 1), again)
    assert len({float(drawn(first, seed)) for seed in range(8)}) > 1


def cross_entropy(model, batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def sampling(model, batch, generator=None) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    drawn = None if generator is None else torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, batch["labels"] if drawn is None else drawn, reduction="none")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sam"},
        {"method": "child-tuning-d"},
        {"curvature": "parabola", "groups": "role", "include": "*.att*", "budget": 600},
    ],
)
def test_a_function_is_measured_as_the_same_loss_of_the_model(options, bert):
    batches = make_batches(bert, num_batches=10)  # enough for counting directions, where labels are sampled
    expected, found = (
        adapeft.select(bert, batches, loss=loss, **{"budget": 300, "warmup_steps": 4, **options})
        for loss in (None, cross_entropy)
    )
    assert repr(found.parts) == repr(expected.parts)
    assert found.choice.value == pytest.approx(expected.choice.value, rel=1e-4)
    assert found.choice.directions is None


def test_preferences_are_measured_and_the_model_is_as_before():
    model = make_gpt2().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subset = adapeft.select(model, preferences(24), loss=dpo, budget=300, fill=False)
    assert subset.count > 0
    assert subset.choice.directions >= 1
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_scalar_is_one_term_of_methods_that_sample_no_labels(bert):
    batches = make_batches(bert)[:4]  # of one size, so that the mean over batches is that over examples

    def mean(model, batch) -> Tensor:
        return model(**batch).loss

    expected, found = (adapeft.select(bert, batches, loss=loss, method="sam", budget=300) for loss in (None, mean))
    assert repr(found.parts) == repr(expected.parts)


def half(model, batch, generator=None) -> Tensor:
    return sampling(model, batch, generator)[: 3 if generator is None else 2]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (cross_entropy, r"third parameter, loss\(model, batch, generator=None\).*curvature='parabola'.*snip or sam"),
        (lambda model, batch, generator=None: cross_entropy(model, batch), "draws nothing from the generator"),
        (
            lambda model, batch, generator=None: sampling(model, batch, generator).mean(),
            r"\[\] with a generator. Return",
        ),
        (lambda model, batch, generator=None: sampling(model, batch, generator)[:, None], r"\[5, 1\] for batch 0 "),
        (lambda model, batch, generator=None: 1.0, r"a float for batch 0 \(counted from 0\). Return a tensor \[T\]"),
        (lambda model, batch, generator=None: sampling(model, batch, generator).detach(), "have no gradient"),
        (half, r"returned 2 terms for batch \d \(counted from 0\), but 3 before"),
        (lambda model: model, r"cannot be called as loss\(model, batch\): too many positional arguments"),
        (7, "loss = 7: give the name of a task, or a function of the model and a batch"),
        ("sequence-clasification", "is not a task.*Did you mean 'sequence-classification'"),
        ("token-classification", r"logits of shape \[5, 3\] for labels of shape \[5\], which do not fit the loss"),
    ],
)
def test_what_is_no_loss_is_refused(loss, message, bert):
    with pytest.raises(AdapeftError, match=message):
        adapeft.select(bert, make_batches(bert), loss=loss, budget=300)


def test_methods_that_measure_examples_take_no_function(bert):
    with pytest.raises(AdapeftError, match="method = fish measures example by example, which a function as loss="):
        adapeft.select(bert, make_batches(bert), loss=sampling, method="fish", budget=300)


def test_a_batch_whose_loss_is_not_finite_is_named(bert):
    batches = make_batches(bert)
    batches[4] = {**batches[4], "labels": torch.full_like(batches[4]["labels"], 7)}

    def clamped(model, batch, generator=None) -> Tensor:
        terms = sampling(model, {**batch, "labels": batch["labels"].clamp(max=2)}, generator)
        return terms * (torch.nan if (batch["labels"] == 7).any() else 1.0)

    with pytest.raises(AdapeftError, match="It comes from example 4 of the batches, each taken as one example"):
        adapeft.select(bert, batches, loss=clamped, budget=300, warmup_steps=0)


def test_a_task_by_name_need_not_be_the_models_own_loss(bert):
    """The plain loss of a model that is trained with another one."""

    class Smoothed(type(bert)):
        def forward(self, input_ids, attention_mask=None, labels=None):
            output = super().forward(input_ids, attention_mask)
            if labels is not None:
                output.loss = F.cross_entropy(output.logits, labels, label_smoothing=0.1)
            return output

    smoothed = Smoothed(bert.config)
    smoothed.load_state_dict(bert.state_dict())
    batches = make_batches(bert)
    with pytest.raises(AdapeftError, match=r"name the loss to measure in adapeft\.select: loss="):
        adapeft.select(smoothed, batches, budget=300)
    expected = adapeft.select(bert, batches, budget=300, warmup_steps=4)
    found = adapeft.select(smoothed, batches, loss="sequence-classification", budget=300, warmup_steps=4)
    assert repr(found.parts) == repr(expected.parts)
    assert found.choice.value == expected.choice.value
