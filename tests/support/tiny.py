"""Tiny models and batches from fixed seeds, for tests in this process and on ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCABULARY = 29


def make_bert() -> BertForSequenceClassification:
    """Two layers with dropout, a new head with three classes, and sizes that no world size divides."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=19,
            max_position_embeddings=16,
            num_labels=3,
        )
    )
    # As after from_pretrained of a checkpoint of the base model: the head is new.
    model.config.architectures = ["BertModel"]
    return _at_work(model)


def make_gpt2() -> GPT2LMHeadModel:
    """Two layers of Conv1D, with embeddings tied to the language-model head."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=3))
    model.config.architectures = ["GPT2LMHeadModel"]
    return _at_work(model)


def make_mixtral() -> MixtralForCausalLM:
    """A mixture of experts, which are fused in one tensor for each layer and matrix."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    config = MixtralConfig(vocab_size=VOCABULARY, intermediate_size=20, **sizes, **experts)
    model = MixtralForCausalLM(config)
    model.config.architectures = ["MixtralForCausalLM"]
    return _at_work(model)


def make_t5() -> T5ForConditionalGeneration:
    """One encoder layer and one decoder layer."""
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 10, "num_layers": 1, "num_heads": 2}
    return _at_work(T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)))


def make_bart() -> BartForConditionalGeneration:
    """One encoder layer and one decoder layer."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 8, "encoder_ffn_dim": 10, "decoder_ffn_dim": 10, "max_position_embeddings": 16}
    return _at_work(BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **layers, **sizes)))


def make_whisper() -> WhisperForConditionalGeneration:
    """A speech-to-text model with inputs ``input_features`` [n, 4, 12]."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 8, "encoder_ffn_dim": 10, "decoder_ffn_dim": 10, "num_mel_bins": 4}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    positions = {"max_source_positions": 6, "max_target_positions": 16, "decoder_start_token_id": 1}
    return _at_work(WhisperForConditionalGeneration(WhisperConfig(**layers, **sizes, **tokens, **positions)))


def make_vit() -> ViTForImageClassification:
    """A classifier of three classes with inputs ``pixel_values`` [n, 3, 8, 8]."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 10}
    return _at_work(ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)))


def make_wav2vec2() -> Wav2Vec2ForSequenceClassification:
    """A classifier of three classes with inputs ``input_values`` [n, 200]."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 10}
    convolutions = {"conv_dim": (6, 6), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 4}
    config = Wav2Vec2Config(
        vocab_size=VOCABULARY,
        num_conv_pos_embedding_groups=2,
        num_labels=3,
        classifier_proj_size=6,
        **sizes,
        **convolutions,
    )
    return _at_work(Wav2Vec2ForSequenceClassification(config))


def make_batches(model: PreTrainedModel, num_batches: int = 6, size: int = 5) -> list[dict[str, Tensor]]:
    """Return batches as of a DataLoader: padded inputs and labels, with a smaller last batch."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(num_batches):
        rows = size if index < num_batches - 1 else size - 2
        ids = torch.randint(1, VOCABULARY, (rows, 9), generator=generator)
        lengths = torch.randint(4, 10, (rows, 1), generator=generator)
        mask = (torch.arange(9) < lengths).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        if hasattr(model, "lm_head"):  # a causal model, or an encoder-decoder that reproduces its input
            batch["labels"] = torch.where(mask.bool(), ids, -100)
        else:
            batch["labels"] = torch.randint(0, 3, (rows,), generator=generator)
        batches.append(batch)
    return batches


def _at_work(model: PreTrainedModel) -> PreTrainedModel:
    """Enlarge the weights: at transformers' initial 0.02 a tiny model's output hardly depends on them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
