"""A tiny random checkpoint of every supported family, made by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny import LAYERS, word_tokenizer

VOCABULARY = 1024  # the tokenizer's, rounded up, so that a quantised head can be packed
WINDOW = 48  # tokens that sliding-window layers see
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOWS = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
}
HEADS_OF_32 = {"head_dim": 32, "query_pre_attn_scalar": 32}
# Heads of 64, the smallest that vLLM's kernels for CPUs take.
DELTA_NET: dict[str, Any] = {
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * (LAYERS // 3),
}
TWO_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS = {**TWO_EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 32}
M_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_interleaved": True,
    "mrope_section": [3, 3, 2],
}

HEADS_OF_32_AND_64 = {"head_dim": 32, "global_head_dim": 64}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SIGHT = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALES_OF_GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}
# Its last two layers read the keys and values of the two before.
GEMMA_4: dict[str, Any] = {
    **HEADS_OF_32_AND_64,
    **WINDOWS,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "final_logit_softcapping": 30.0,
}


def of(config: str, without: str = "", **more: Any) -> Callable[..., Any]:
    """Makes the config of this class of transformers of a shape, which `more` changes."""

    def make(**shape: Any) -> Any:
        given = {name: value for name, value in shape.items() if name != without}
        return getattr(transformers, f"{config}Config")(**{**given, **more})

    return make


def opt(**more: Any) -> Any:
    given = {name: SHAPE[name] for name in SHAPE if "key_value" not in name}
    given |= {"ffn_dim": given.pop("intermediate_size"), "init_std": given.pop("initializer_range")}
    return transformers.OPTConfig(**{"word_embed_proj_dim": 64, **given, **more})


# Of each the architecture that vLLM serves it as, and what the family is in the table for.
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": of("Llama"),
    "llama3": of("Llama", tie_word_embeddings=True, rope_parameters=LLAMA_3_ROPE),
    "mistral": of("Mistral", sliding_window=WINDOW),
    "phi3": of("Phi3"),
    "qwen2": of("Qwen2"),
    "qwen3": of("Qwen3", head_dim=32),
    "ernie4.5": of("Ernie4_5", head_dim=32),
    "glm4": of("Glm4", head_dim=32),
    "granite": of("Granite", **SCALES_OF_GRANITE),
    "gemma": of("Gemma", head_dim=32),
    "gemma2": of("Gemma2", **HEADS_OF_32, **WINDOWS),
    "gemma3": of("Gemma3Text", **HEADS_OF_32, **WINDOWS),
    "gemma4": of("Gemma4Text", **GEMMA_4),
    "gemma4-multimodal": lambda **shape: transformers.Gemma4Config(
        text_config=of("Gemma4Text", **GEMMA_4)(**shape).to_dict(),
        vision_config=of("Gemma4Vision")(**VISION).to_dict(),
    ),
    "gemma4-large": of(
        "Gemma4Text",
        **HEADS_OF_32_AND_64,
        **WINDOWS,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=32,
    ),
    "mixtral": of("Mixtral", num_local_experts=4),
    "qwen3-moe": of("Qwen3Moe", head_dim=32, num_experts=6, mlp_only_layers=[1], **TWO_EXPERTS),
    "olmoe": of("Olmoe", num_key_value_heads=2, num_experts=6, num_experts_per_tok=2),
    "gpt-oss": of("GptOss", head_dim=32, num_local_experts=4, num_experts_per_tok=2, **WINDOWS),
    "glm4-moe": of(
        "Glm4Moe",
        head_dim=32,
        n_routed_experts=6,
        n_group=2,
        topk_group=1,
        use_qk_norm=True,
        num_nextn_predict_layers=0,
        **TWO_EXPERTS,
    ),
    "qwen3.5": of("Qwen3_5Text", **DELTA_NET),
    "qwen3.5-moe": of("Qwen3_5MoeText", "intermediate_size", **DELTA_NET, **EXPERTS),
    "qwen3.5-multimodal": lambda **shape: transformers.Qwen3_5Config(
        text_config={**shape, **DELTA_NET, "rope_parameters": M_ROPE},
        vision_config=of("Qwen3_5Vision")(**SIGHT, out_hidden_size=64).to_dict(),
    ),
    "qwen3-next": of("Qwen3Next", **DELTA_NET, **EXPERTS),
    "opt": lambda **_: opt(),
    "opt-350m": lambda **_: opt(word_embed_proj_dim=32, do_layer_norm_before=False),
    "opt-without-final-norm": lambda **_: opt(_remove_final_layer_norm=True),
}


def transformers_class(config: Any) -> Any:
    """What builds a model with `config`, with its images if it has any."""
    has_images = config.get_text_config() is not config
    if has_images:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def tiny_checkpoint(family: str, directory: Path, vocabulary: int = VOCABULARY) -> Path:
    """Weights, biases and norms are all random, so that none of them can be forgotten unseen."""
    tokenizer = word_tokenizer()
    config = FAMILIES[family](**SHAPE)
    config.get_text_config().vocab_size = vocabulary
    torch.manual_seed(0)
    model = transformers_class(config).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
