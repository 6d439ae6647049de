"""Generated answers equal those of transformers, one prompt at a time."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapeft.tasks.generation import answer, is_independent_of_padding
from tests.support import questions
from tests.support.tiny import make_bart, make_t5


class Careless(GPT2LMHeadModel):
    """A model that reads padding."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        return super().forward(input_ids, **options)


@pytest.mark.parametrize("make", [questions.make_llama, questions.make_gpt2])
def test_a_batch_is_answered_as_each_prompt_alone(make):
    model, prompts = make(), questions.make_prompts()
    expected = questions.answers_alone(model, prompts)
    assert answer(model, prompts, range(len(prompts)), in_step=False) == expected
    without_end = answer(model, replace(prompts, ends=frozenset()), range(len(prompts)), in_step=False)
    ended = [one != other for one, other in zip(expected, without_end, strict=True)]
    assert any(ended)
    assert len(set(expected)) > 2


def test_answers_are_greedy_whatever_the_model_s_own_settings(monkeypatch):
    model, prompts = questions.make_llama(), questions.make_prompts()
    expected = answer(model, prompts, [0, 3], in_step=False)
    model.generation_config.update(do_sample=True, temperature=5.0, num_beams=3, use_cache=False, eos_token_id=None)
    own = copy.deepcopy(model.generation_config)
    caches = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **options: caches.append(options.get("use_cache")) or forward(*args, **options)
    )
    assert answer(model, prompts, [0, 3], in_step=False) == expected
    assert set(caches) == {True}
    assert model.generation_config == own


@pytest.mark.parametrize("make", [make_t5, make_bart])
def test_an_encoder_decoder_answers_as_transformers(make):
    model, prompts = make().eval(), questions.make_prompts(4)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    model.generation_config.update(decoder_start_token_id=2, eos_token_id=2)
    prompts = replace(prompts, ids=[[5, 7], [9], [6, 6, 6, 20], [11, 12, 13]], max_new_tokens=6, ends=frozenset({3}))
    expected = []
    for ids in prompts.ids:
        [own] = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=[2, 3])
        expected.append(prompts.tokenizer.decode(own[1:], skip_special_tokens=True).strip())
    assert answer(model, prompts, range(4), in_step=False) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_padding_is_found(dtype):
    prompts = questions.make_prompts()
    model = questions.make_gpt2().to(dtype)
    assert is_independent_of_padding(model, prompts, in_step=False)
    careless = Careless(model.config).eval().to(dtype)
    careless.load_state_dict(model.state_dict())
    assert not is_independent_of_padding(careless, prompts, in_step=False)
    one_length = replace(prompts, ids=[[7, 8], [9, 10]])
    assert is_independent_of_padding(careless, one_length, in_step=False)


def test_other_kernels_for_a_batch_are_no_padding():
    """In bfloat16 they round by a hundredth here, as SmolLM2-135M's do, whose answers came one at a time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, initializer_range=0.2, **shape)).eval().bfloat16()
    prompts = replace(questions.make_prompts(), ids=[[7, 8, 9, 4, 3] * 8, [5, 6] * 100])
    assert is_independent_of_padding(model, prompts, in_step=False)
