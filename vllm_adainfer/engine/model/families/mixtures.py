"""Mixtures of experts with exit points.

vLLM 0.32 routes each row by its own state, and experts have no capacity limit. So rows that leave
change nothing for the rows that stay.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override
from vllm.model_executor.models.glm4_moe import Glm4MoeForCausalLM
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM
from vllm.model_executor.models.olmoe import OlmoeForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.segments.decoder import Decoder, KVProjection, Layer


class GptOssDecoder(Decoder):
    """As Llama, but with other names, and arguments in another order."""

    @staticmethod
    @override
    def run_layer(
        layer: Layer, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        after: tuple[Tensor, Tensor | None] = layer(hidden, positions, residual)
        return after

    @staticmethod
    @override
    def kv_projection(layer: Any) -> KVProjection:
        return KVProjection(
            attention=layer.attn.attn,
            qkv_proj=layer.attn.qkv_proj,
            norm=layer.input_layernorm,
            rotary=layer.attn.rotary_emb,
        )


class AdaInferGlm4MoeForCausalLM(EarlyExit, Glm4MoeForCausalLM):
    """GLM-4.5 and later ones of its architecture."""

    decoder = Decoder


class AdaInferGptOssForCausalLM(EarlyExit, GptOssForCausalLM):
    """gpt-oss."""

    decoder = GptOssDecoder


class AdaInferMixtralForCausalLM(EarlyExit, MixtralForCausalLM):
    """Mixtral."""

    decoder = Decoder


class AdaInferOlmoeForCausalLM(EarlyExit, OlmoeForCausalLM):
    """OLMoE."""

    decoder = Decoder


class AdaInferQwen3MoeForCausalLM(EarlyExit, Qwen3MoeForCausalLM):
    """Qwen 3, mixtures."""

    decoder = Decoder
