"""Gemma 1 to 4 with exit points, for text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from typing_extensions import override
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM
from vllm.model_executor.models.gemma4_mm import Gemma4ForConditionalGeneration

from vllm_adainfer.engine.classes import own_kv_layers
from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.segments.decoder import Decoder, KVProjection, Layer, OnePartDecoder


class Gemma2Decoder(Decoder):
    """As Llama, but the embedding is also the LM head."""

    @staticmethod
    @override
    def head(model: Any) -> Any:
        return model.model.embed_tokens


class Gemma4Decoder(OnePartDecoder):
    """With a separate input for each layer.

    In some sizes the later layers share the keys and values of earlier ones.
    """

    @staticmethod
    @override
    def per_layer_inputs(body: Any, ids: Tensor, embedded: Tensor) -> Tensor | None:
        inputs: Tensor | None = body.get_per_layer_inputs(ids)
        projected: Tensor | None = body.project_per_layer_inputs(embedded, inputs)
        return projected

    @staticmethod
    @override
    def given(layer: nn.Module, own: Tensor) -> Layer:
        return partial(layer, per_layer_input=own)

    @staticmethod
    @override
    def own_kv_layers(body: Any) -> int | None:
        return own_kv_layers(body.config)

    @staticmethod
    @override
    def run_layer(
        layer: Layer, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, None]:
        return layer(positions, hidden, None)[0], None

    @staticmethod
    @override
    def kv_projection(layer: Any) -> KVProjection:
        return replace(Decoder.kv_projection(layer), value_norm=layer.self_attn.v_norm)


class AdaInferGemmaForCausalLM(EarlyExit, GemmaForCausalLM):
    """Gemma 1."""

    decoder = Decoder


class AdaInferGemma2ForCausalLM(EarlyExit, Gemma2ForCausalLM):
    """Gemma 2."""

    decoder = Gemma2Decoder


class AdaInferGemma3ForCausalLM(EarlyExit, Gemma3ForCausalLM):
    """Gemma 3, text only."""

    decoder = Decoder


class AdaInferGemma4ForCausalLM(EarlyExit, Gemma4ForCausalLM):
    """Gemma 4, text only."""

    decoder = Gemma4Decoder


class AdaInferGemma4ForConditionalGeneration(EarlyExit, Gemma4ForConditionalGeneration):
    """The multimodal Gemma 4, served with text only."""

    decoder = Gemma4Decoder
