"""The LoRA that both vLLM and SGLang serve: which layers, and of what rank.

Sources, read in 2026: vLLM's ``lora/peft_helper.py`` (``PEFTHelper``), ``config/lora.py`` (``MaxLoRARanks``) and
``lora/utils.py``; SGLang's ``srt/lora/lora_config.py``, ``lora.py`` and ``utils.py``. In short:

- One adapter of type LoRA, without ``modules_to_save``, biases or DoRA, which vLLM refuses.
- r of at most ``MAX_RANK``. Both scale by ``lora_alpha / r`` and do not use ``rank_pattern`` and ``alpha_pattern``:
  vLLM ignores them, SGLang allocates by r. So all matrices are padded to one rank.
- ``target_modules`` is a list: SGLang does not interpret a pattern.
- The linear layers in ``LAYERS``. vLLM serves LoRA on every linear layer of a model, SGLang on those whose sizes it
  knows (``get_hidden_dim``). Rows of embeddings and the output embeddings depend on their versions and are left out.
- SGLang stacks the layers of ``STACKED`` and assumes that all of one stack have LoRA (``normalize_qkv_proj`` looks
  up the values when it finds the queries, ``normalize_gate_up_proj`` starts from the gate): missing ones get zeros.

Both convert the tensors to the served model's dtype.
"""

from __future__ import annotations

MAX_RANK = 256
"""Largest rank that all versions of vLLM accept; newer ones also accept 320 and 512. k rows have rank k."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256)
"""Values of vLLM's ``max_lora_rank`` in all versions."""

STACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that both servers compute as one matrix."""

LAYERS = (*STACKED[0], "o_proj", *STACKED[1], "down_proj")
"""Last names of the linear layers whose LoRA both serve."""


def is_servable(name: str) -> bool:
    """Return whether both serve LoRA on the weight called ``name``, by the name of its layer."""
    layer, _, local = name.rpartition(".")
    return local == "weight" and layer.rpartition(".")[2] in LAYERS


def rank_to_serve(rank: int) -> int:
    """Return the smallest ``max_lora_rank`` with which vLLM loads an adapter of ``rank``."""
    return next(most for most in VLLM_RANKS if most >= rank)
