"""Tests of the batches that TRL's own trainers make: padded, packed, padding-free, and pairs of answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adapeft
from adapeft.errors import AdapeftError
from tests.support.chats import make_tokenizer

pytestmark = pytest.mark.slow  # TRL alone takes many seconds to import

_QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
COMPLETIONS = [{"prompt": f"{n} and {n}", "completion": " yes" * (1 + n % 3)} for n in range(24)]
TEXTS = [{"text": f"{n} and {n}" * (1 + n % 3)} for n in range(24)]
PAIRS = [{"prompt": f"{n} and {n}", "chosen": " yes" * (1 + n % 3), "rejected": " no"} for n in range(24)]


@pytest.fixture
def model(tmp_path) -> LlamaForCausalLM:
    """A model that DPOTrainer can load again as the reference."""
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 10}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(make_tokenizer()), **sizes)).save_pretrained(tmp_path / "model")
    return LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)


def sft_trainer(model, rows: list[dict[str, str]], folder, **options):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = {"per_device_train_batch_size": 4, "max_length": 64, **_QUIET, **options}
    config = SFTConfig(output_dir=str(folder), **arguments)
    return SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer())


def dpo_trainer(model, folder, **options):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(output_dir=str(folder), per_device_train_batch_size=4, beta=0.1, **_QUIET, **options)
    return DPOTrainer(model, args=config, train_dataset=Dataset.from_list(PAIRS), processing_class=make_tokenizer())


def dpo_loss(model, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Return DPO's loss of every pair at the start, where the model is its own reference."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    log_probs = (logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0] * mask).sum(1)
    chosen, rejected = (log_probs - log_probs.detach()).chunk(2)
    margins = 0.1 * (chosen - rejected)
    preferred = torch.ones_like(margins)
    if generator is not None:
        preferred = torch.bernoulli(margins.sigmoid(), generator=generator)
    return F.binary_cross_entropy_with_logits(margins, preferred, reduction="none")


@pytest.mark.parametrize(
    ("rows", "options", "inputs"),
    [
        pytest.param(COMPLETIONS, {}, {"attention_mask"}, id="completions"),
        pytest.param(TEXTS, {"packing": True, "packing_strategy": "wrapped"}, {"attention_mask"}, id="wrapped"),
        pytest.param(TEXTS, {"packing": True}, {"position_ids", "cu_seq_lens_q", "max_length_q", "seq_idx"}, id="bfd"),
        pytest.param(
            COMPLETIONS, {"padding_free": True, "max_length": None}, {"position_ids", "max_length_q"}, id="padding-free"
        ),
    ],
)
def test_the_batches_of_sft_choose_a_subset_that_sft_trains(model, tmp_path, rows, options, inputs):
    trainer = sft_trainer(model, rows, tmp_path, **options)
    batches = list(trainer.get_train_dataloader())
    assert inputs <= batches[0].keys()
    subset = adapeft.select(model, batches, budget=50, groups="element", warmup_steps=0)
    assert subset.count == 50
    adapeft.attach(model, subset)
    trainer.train()
    assert trainer.state.global_step == 2
    assert adapeft.delta(model).changes


def test_padding_free_batches_choose_as_padded_ones(model, tmp_path):
    """Rows of several examples do not let one read another, and every label counts once."""
    subsets = []
    for options in ({}, {"padding_free": True, "max_length": None}):
        batches = list(sft_trainer(model, COMPLETIONS, tmp_path, **options).get_train_dataloader())
        subsets.append(adapeft.select(model, batches, method="sam", budget=50, groups="element", warmup_steps=0))
    padded, free = subsets
    assert padded.choice.value == pytest.approx(free.choice.value, rel=1e-4)
    assert repr(padded.parts) == repr(free.parts)


def test_methods_that_measure_examples_name_what_shows_packing(model, tmp_path):
    batches = list(sft_trainer(model, COMPLETIONS, tmp_path).get_train_dataloader())
    assert adapeft.select(model, batches, method="fish", budget=50, groups="element").count == 50
    packed = list(sft_trainer(model, TEXTS, tmp_path, packing=True).get_train_dataloader())
    message = "batch 0 is packed: according to 'cu_seq_lens_q', .* Pass batches with one example per row"
    with pytest.raises(AdapeftError, match=message):
        adapeft.select(model, packed, method="fish", budget=50, groups="element")


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=["reference", "precomputed"])
def test_the_batches_of_dpo_need_its_loss(model, tmp_path, options):
    trainer = dpo_trainer(model, tmp_path, **options)
    batches = list(trainer.get_train_dataloader())
    with pytest.raises(AdapeftError, match=r"no 'labels', but answers to compare.*'completion_mask'.*loss= \(deploy"):
        adapeft.select(model, batches, budget=50, groups="element")
    subset = adapeft.select(model, batches, loss=dpo_loss, budget=50, groups="element")
    assert subset.count == 50
    adapeft.attach(model, subset)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(0.693, abs=1e-2)
    assert adapeft.delta(model).changes
