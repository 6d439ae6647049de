"""What a model keeps of the forward pass."""

from __future__ import annotations

from transformers import PreTrainedModel


def recompute_activations(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing, which transformers calls activation checkpointing from 5.23 on and alone in v6."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
