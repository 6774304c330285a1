"""Qwen3-Next and Qwen 3.5, whose gated delta-net layers keep a state for each request.

Such a layer takes a request's rows in order. Rows that exit are either the last ones of their
request, so no later row needs the state that they did not update; or they are deferred, and go
through the layer in order with a later row of their request (`RecurrentKV`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import override
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
)
from vllm.model_executor.models.qwen3_next import Qwen3NextForCausalLM

from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.segments.decoder import Decoder, KVProjection, Layer


class KeyRotary(nn.Module):
    """Rotates keys alone with vLLM's M-RoPE, which takes no keys without queries."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    @override
    def forward(self, positions: Tensor, keys: Tensor, _: None) -> tuple[Tensor, None]:
        return self.rotary(positions, keys, keys.clone())[0], None


class DeltaNetDecoder(Decoder):
    """As Llama, but layers take their arguments in another order."""

    @staticmethod
    @override
    def run_layer(
        layer: Layer, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        after: tuple[Tensor, Tensor | None] = layer(hidden, residual, positions)
        return after

    @staticmethod
    @override
    def kv_projection(layer: Any) -> KVProjection:
        projection = Decoder.kv_projection(layer)
        if not isinstance(projection.rotary, MRotaryEmbedding):
            return projection
        return replace(projection, rotary=KeyRotary(projection.rotary))


class AdaInferQwen3NextForCausalLM(EarlyExit, Qwen3NextForCausalLM):
    """Qwen3-Next."""

    decoder = DeltaNetDecoder


class AdaInferQwen3_5ForCausalLM(EarlyExit, Qwen3_5ForCausalLM):
    """Qwen 3.5, dense, text only."""

    decoder = DeltaNetDecoder


class AdaInferQwen3_5MoeForCausalLM(EarlyExit, Qwen3_5MoeForCausalLM):
    """Qwen 3.5, mixtures, text only."""

    decoder = DeltaNetDecoder


class AdaInferQwen3_5ForConditionalGeneration(EarlyExit, Qwen3_5ForConditionalGeneration):
    """The multimodal Qwen 3.5, dense, served with text only."""

    decoder = DeltaNetDecoder


class AdaInferQwen3_5MoeForConditionalGeneration(EarlyExit, Qwen3_5MoeForConditionalGeneration):
    """The multimodal Qwen 3.5, mixtures, served with text only."""

    decoder = DeltaNetDecoder
