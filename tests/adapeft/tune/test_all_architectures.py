"""Tests of tiny transformers architectures: attached equals applied equals saved, and every leaf has its gradient.

Some elements, some rows or the whole of every parameter are trained. Not in the table, because they cannot be built
tiny on a CPU: vision models behind timm, models whose sizes are fixed by their code (CLIP's towers, EfficientNet,
MobileNet, Perceiver, Whisper's 3,000 frames) and multimodal models whose configs contain others. Nor are PP-LCNet,
which returns no logits, and those that transformers itself does not restore as saved: FSMT and XLNet have
float32 tensors next to float64 weights, Youtu clears the row of the padding, and Marian's encoder-decoder leaves its
position tables out of its checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from adapeft import attach, delta
from adapeft.measure.shards.shards import WholeModel
from adapeft.parts.elements import Elements
from adapeft.parts.part import Part
from adapeft.parts.rows import Rows
from adapeft.parts.whole import Whole
from adapeft.subset.subset import Subset
from adapeft.tune.attachment import attachment_of
from tests.oracles.leaves import densify, gather

pytestmark = pytest.mark.slow

VOCABULARY = 37
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "type_vocab_size": 2, "num_labels": 3},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "num_mel_bins", "image_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_attention_heads", "n_head", "num_heads", "n_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 32),
    **dict.fromkeys(("head_dim", "d_kv", "linear_key_head_dim", "linear_value_head_dim", "bottleneck_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "mamba_d_head", "embed_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "state_size", "mamba_d_state"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "hidden_size_per_layer_input", "patch_size"), 4),
    **dict.fromkeys(("mamba_n_heads", "num_conv_pos_embeddings", "rotary_dim"), 4),
    **{"conv_kernel": 3, "time_step_rank": 3, "mamba_d_conv": 3, "expand": 2, "mamba_expand": 2, "layerdrop": 0.0},
    **dict.fromkeys(("num_experts_per_tok", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("num_stages", "num_feat_extract_layers", "num_conv_pos_embedding_groups", "window_size"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "mamba_n_groups"), 1),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **{"conv_dim": (8, 8), "conv_stride": (5, 2), "depths": [1, 1], "hidden_sizes": [8, 16]},
}


class Kind(NamedTuple):
    """A head and the families that have it.

    Attributes:
        heads: name of the table of heads in transformers.
        families: model types.
        sizes: sizes in place of ``SIZES``; None for those of the config.
    """

    heads: str
    families: str
    sizes: dict[str, Any] = {}


KINDS = {
    "decoder": Kind(
        "CAUSAL_LM",
        (
            "afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bert-generation big_bird "
            "bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom camembert cohere cohere2 cohere2_moe "
            "cpmant ctrl cwm data2vec-text deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 "
            "dots3_note_text electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_mamba flex_olmo "
            "flint gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite "
            "glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa "
            "granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense "
            "hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder jais2 jamba jetmoe "
            "kolibri1 laguna lfm2 lfm3 llama4_text longcat_flash mamba marian mbart megatron-bert mellum minicpm3 "
            "minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi "
            "mpt mvp nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi "
            "phi3 phimoe plbart prophetnet qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma rembert "
            "roberta roberta-prelayernorm roformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr "
            "vaultgemma whisper xlm xlm-roberta xlm-roberta-xl xlstm "
        ),
    ),
    "encoder": Kind(
        "MASKED_LM",
        (
            "albert bart bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra "
            "ernie esm esmc eurobert flaubert fnet gte ibert jina_embeddings_v3 layoutlm mbart megatron-bert "
            "modernbert mpnet mvp nomic_bert nystromformer rembert roberta roberta-prelayernorm roformer "
            "squeezebert tapas ultrabert xlm xlm-roberta xlm-roberta-xl yoso "
        ),
    ),
    "encoder-decoder": Kind(
        "SEQ_TO_SEQ_CAUSAL_LM",
        (
            "bart bigbird_pegasus blenderbot blenderbot-small longt5 m2m_100 mbart mt5 mvp nllb-moe "
            "pegasus pegasus_x plbart prophetnet "
        ),
    ),
    "vision": Kind(
        "IMAGE_CLASSIFICATION",
        (
            "beit convnext convnextv2 data2vec-vision deit dinov2 dinov2_with_registers focalnet ijepa "
            "regnet resnet vit vit_msn "
        ),
    ),
    "speech": Kind(
        "CTC",
        ("data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm "),
        {"conv_kernel": (10, 3)},
    ),
    "audio": Kind(
        "AUDIO_CLASSIFICATION",
        ("data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm "),
        {"conv_kernel": (10, 3)},
    ),
}
CASES = [(kind, family) for kind, (_, families, _) in KINDS.items() for family in families.split()]


def make(kind: str, family: str) -> nn.Module:
    """Return a float64 model with weights of normal size; experts run one by one: grouped products lack float64."""
    config_class = CONFIG_MAPPING[family]
    known = config_class().to_dict().keys() | getattr(config_class, "attribute_map", {}).keys()
    sizes = {**SIZES, **KINDS[kind].sizes}
    if kind != "vision":
        sizes = {name: size for name, size in sizes.items() if name not in ("depths", "hidden_sizes")}
    if "qk_rope_head_dim" in known:
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    config = config_class(**{name: size for name, size in sizes.items() if name in known})
    heads = getattr(modeling_auto, f"MODEL_FOR_{KINDS[kind].heads}_MAPPING_NAMES")[family]
    name = heads if isinstance(heads, str) else heads[0]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).double().eval()
    model.set_experts_implementation("eager")
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.1)
    model.config.architectures = [name]
    return model


def inputs_of(kind: str, model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    if kind == "encoder-decoder":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    if kind == "vision":
        size = getattr(model.config, "image_size", 32)
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)}
    if kind in ("speech", "audio"):
        if model.main_input_name == "input_features":
            width = getattr(model.config, "num_mel_bins", None) or model.config.feature_projection_input_dim
            return {"input_features": torch.randn(2, 16, width, generator=generator, dtype=torch.float64)}
        return {"input_values": torch.randn(2, 800, generator=generator, dtype=torch.float64)}
    return {"input_ids": ids}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # ESM-C and YOSO also draw random numbers in evaluation
    return model(**inputs).logits


def loss_of(logits: Tensor) -> Tensor:
    """Return a loss whose gradient differs in every output."""
    return (logits * torch.arange(1.0, logits.numel() + 1, dtype=logits.dtype).view(logits.shape).sin()).sum()


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Return elements, rows and whole tensors in turn."""
    parts = {}
    for position, (name, parameter) in enumerate(model.named_parameters()):
        shape = tuple(parameter.shape)
        if not shape or position % 3 == 2:
            parts[name] = Whole(shape)
        elif position % 3 == 1:
            parts[name] = Rows(shape, torch.arange(0, shape[0], 2))
        else:
            parts[name] = Elements(shape, torch.arange(0, parameter.numel(), 3))
    return parts


def unreached(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> set[str]:
    """Return the names of parameters that measuring would leave out."""
    names = [name for name, _ in model.named_parameters()]
    shards = WholeModel(model, names)
    with shards.gradients([loss]):
        return set(names) - shards.reached


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_every_leaf_is_trained(kind, family, tmp_path):
    model, oracle = make(kind, family), make(kind, family)
    inputs, parts = inputs_of(kind, model), parts_of(model)
    without_gradient = unreached(copy.deepcopy(model), lambda m: loss_of(run(m, inputs)))

    attach(model, Subset(parts))
    trained = attachment_of(model).trained
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, part in parts.items():
            values = torch.randn(trained[name].shape, generator=generator) * 0.05
            trained[name].add_(values)
            oracle.get_parameter(name).add_(densify(part, values.double()))

    logits, expected = run(model, inputs), run(oracle, inputs)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9 * scale)
    loss_of(logits).backward()
    loss_of(expected).backward()

    gradients = {name: oracle.get_parameter(name).grad for name in parts}
    assert {name for name, gradient in gradients.items() if gradient is None} == without_gradient
    assert set(attachment_of(model).unreached) == without_gradient
    largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    for name, part in parts.items():
        if name not in without_gradient:
            # Leaves are float32: each use of a weight, two or more where it is tied, rounds its gradient once.
            found, wanted = trained[name].grad.double(), gather(part, gradients[name])
            atol = 1e-5 * float(wanted.abs().max()) + 1e-11 * largest
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=atol, msg=name)

    # Deltas are float32 and round each changed weight once, by 6e-8 of it; norm layers multiply that.
    fresh = make(kind, family)
    delta(model).apply(fresh)
    torch.testing.assert_close(run(fresh, inputs), expected, rtol=1e-4, atol=1e-4 * scale)

    model.save_pretrained(tmp_path)
    saved = type(oracle).from_pretrained(tmp_path, dtype=torch.float64).eval()
    saved.set_experts_implementation("eager")
    torch.testing.assert_close(run(saved, inputs), expected, rtol=1e-4, atol=1e-4 * scale)
