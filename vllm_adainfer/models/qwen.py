"""Qwen 2, 2.5 and 3 with exit points."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_adainfer.models.decoder import Decoder, KVProjection
from vllm_adainfer.models.early_exit import EarlyExit


class Qwen3Decoder(Decoder):
    """Llama's, with a norm of each key."""

    @staticmethod
    def kv_projection(layer: Any) -> KVProjection:
        """See `Decoder.kv_projection`."""
        return replace(Decoder.kv_projection(layer), key_norm=layer.self_attn.k_norm)


class AdaInferQwen2ForCausalLM(EarlyExit, Qwen2ForCausalLM):
    """Qwen 2 and 2.5."""

    decoder = Decoder


class AdaInferQwen3ForCausalLM(EarlyExit, Qwen3ForCausalLM):
    """Qwen 3, dense."""

    decoder = Qwen3Decoder
