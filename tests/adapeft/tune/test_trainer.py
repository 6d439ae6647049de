"""Tests of select, attach, train, delta and apply in the Trainer's loop and in a plain one."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator

import adapeft
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import changed, inside, logits, train, weights
from tests.support.tiny import make_batches, make_bert, make_gpt2
from tests.support.trainers import examples, saving_trainer


def assert_shipped(model: torch.nn.Module, base: torch.nn.Module, tolerance: float) -> None:
    """Check that the delta of ``model`` gives ``base`` its outputs and changes nothing outside the subset."""
    subset, before, untrained = attachment_of(model).subset, weights(base), logits(base)
    adapeft.delta(model).apply(base)
    torch.testing.assert_close(logits(base), logits(model), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(logits(base), untrained, rtol=tolerance, atol=tolerance), "nothing was learned"
    for name, mask in changed(before, weights(base)).items():
        assert name in subset.new or not (mask & ~inside(subset.parts.get(name), mask.shape)).any()


VARIANTS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "autocast": {"bf16": True},
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "adafactor": {"optim": "adafactor"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}
"""Arguments of the Trainer."""
FAST = {("bert", "row", "plain"), ("bert", "element", "autocast"), ("gpt2", "row", "label-smoothing")}


@pytest.mark.parametrize(
    ("name", "groups", "variant"),
    [
        pytest.param(*case, id="-".join(case), marks=[] if case in FAST else pytest.mark.slow)
        for case in product(("bert", "gpt2"), ("row", "element", "tensor"), VARIANTS)
        if "compiled" not in case or case[:2] in {("bert", "element"), ("gpt2", "row")}  # compiling takes 15 seconds
    ],
)
def test_the_trainer_of_transformers(name, groups, variant, tmp_path):
    """GPT-2's embeddings are tied to its head."""
    make = make_bert if name == "bert" else make_gpt2
    model, base = make(), make()
    loader = DataLoader(examples(model), batch_size=4, collate_fn=default_data_collator)
    tied = {"include": ["*wte*", "*c_attn*", "*.bias"]} if name == "gpt2" else {}
    subset = adapeft.select(model, loader, budget="10%", groups=groups, warmup_steps=4, **tied)
    assert "transformer.wte.weight" in subset.parts or name == "bert"
    assert 0 < subset.count <= subset.choice.budget
    assert not any(mask.any() for mask in changed(weights(base), weights(model)).values()), "measuring changes nothing"
    adapeft.attach(model, subset)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **VARIANTS[variant],
    )
    trainer = Trainer(model, arguments, train_dataset=examples(model))
    trainer.train()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in attachment_of(model).trained.values()}
    # Accelerate's autocast stays around the trained model's forward.
    assert_shipped(model, base, tolerance=5e-2 if variant == "autocast" else 1e-4)


@pytest.mark.slow
def test_a_checkpoint_of_the_trainer_resumes(tmp_path):
    """Also for tied leaves: the leaf of GPT-2's embedding is in the checkpoint and is read back into both places."""

    def attached(base: torch.nn.Module) -> torch.nn.Module:
        return adapeft.attach(base, subset)

    subset = adapeft.select(
        make_gpt2(), make_batches(make_gpt2()), budget="10%", include=["*wte*", "*c_attn*"], warmup_steps=4
    )
    assert "transformer.wte.weight" in subset.parts
    through = attached(make_gpt2())
    saving_trainer(through, tmp_path, 4).train()
    resumed = attached(make_gpt2())
    saving_trainer(resumed, tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, leaf in attachment_of(through).trained.items():
        torch.testing.assert_close(attachment_of(resumed).trained[name], leaf)
    assert resumed.lm_head.weight_leaf is resumed.transformer.wte.weight_leaf
    assert_shipped(resumed, make_gpt2(), tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maker", [make_bert, make_gpt2])
def test_a_loop_of_ones_own(maker, dtype, tmp_path):
    model, base = maker().to(dtype), maker().to(dtype)
    subset = adapeft.select(model, make_batches(model), budget="10%", groups="row", warmup_steps=4)
    subset.save(tmp_path / "subset.safetensors")
    adapeft.attach(model, adapeft.Subset.load(tmp_path / "subset.safetensors"))
    optimizer = train(model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in attachment_of(model).trained.values()
    }
    assert_shipped(model, base, tolerance=1e-4 if dtype == torch.float32 else 5e-2)
