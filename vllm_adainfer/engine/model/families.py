"""vLLM's model classes with exit points, each made when vLLM asks this module for it by name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pkgutil import resolve_name
from types import new_class
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override
from vllm.compilation.decorators import ignore_torch_compile
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding

from vllm_adainfer.engine.classes import STOCK, own_kv_layers
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


class GraniteDecoder(OnePartDecoder):
    """With a scaled embedding."""

    @staticmethod
    @override
    def embed(body: Any, ids: Tensor, positions: Tensor) -> Tensor:
        return Decoder.embed(body, ids, positions) * float(body.config.embedding_multiplier)


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


class OPTDecoder(Decoder):
    """Learned positions, a residual stream in one part, LayerNorm before each block.

    OPT-350m normalises after its blocks, and projects a narrower embedding to the stream and back.
    """

    @staticmethod
    @override
    def body(model: Any) -> Any:
        return model.model.decoder

    @staticmethod
    @override
    def embed(body: Any, ids: Tensor, positions: Tensor) -> Tensor:
        embedded = body.embed_input_ids(ids)
        if body.project_in is not None:
            embedded, _ = body.project_in(embedded)
        hidden: Tensor = embedded + body.embed_positions(positions)
        return hidden

    @staticmethod
    @override
    def run_layer(
        layer: Layer, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, None]:
        return layer(hidden), None

    @staticmethod
    @override
    def finish(body: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
        if body.final_layer_norm is not None:
            hidden = body.final_layer_norm(hidden)
        if body.project_out is not None:
            hidden, _ = body.project_out(hidden)
        return hidden

    @staticmethod
    @override
    def final_norm(body: Any) -> nn.Module | None:
        norm: nn.Module | None = body.final_layer_norm
        return norm

    @staticmethod
    @override
    def projection(body: Any) -> Tensor | None:
        if body.project_out is None:
            return None
        positions = body.embed_positions.weight  # vLLM may have repacked the projection's weights
        eye = torch.eye(positions.shape[1], dtype=positions.dtype, device=positions.device)
        projection: Tensor = body.project_out(eye)[0]
        return projection

    @staticmethod
    @override
    def kv_projection(layer: Any) -> KVProjection:
        return KVProjection(
            attention=layer.self_attn.attn,
            qkv_proj=layer.self_attn.qkv_proj,
            norm=layer.self_attn_layer_norm if layer.do_layer_norm_before else None,
        )


class KeyRotary(nn.Module):
    """Rotates keys alone with vLLM's M-RoPE, which takes no keys without queries."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    @override
    def forward(self, positions: Tensor, keys: Tensor, _: None) -> tuple[Tensor, None]:
        return self.rotary(positions, keys, keys.clone())[0], None


class DeltaNetDecoder(Decoder):
    """Qwen3-Next and Qwen 3.5, whose layers take their arguments in another order.

    Gated delta-net layers keep a state for each request, and take its rows in order. Rows that exit
    are either the last ones of their request, so no later row needs the state that they did not
    update; or they are deferred, and go through the layer in order with a later row of their
    request (`RecurrentKV`).
    """

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


# By stock class, where a family is not as Llama. Mixtures of experts may be: vLLM 0.32 routes each
# row by its own state without a capacity limit, so rows that leave change nothing for the others.
DECODERS: dict[str, type[Decoder]] = {
    "Gemma2ForCausalLM": Gemma2Decoder,
    "Gemma4ForCausalLM": Gemma4Decoder,
    "Gemma4ForConditionalGeneration": Gemma4Decoder,
    "GptOssForCausalLM": GptOssDecoder,
    "GraniteForCausalLM": GraniteDecoder,
    "OPTForCausalLM": OPTDecoder,
    "Qwen3NextForCausalLM": DeltaNetDecoder,
    "Qwen3_5ForCausalLM": DeltaNetDecoder,
    "Qwen3_5ForConditionalGeneration": DeltaNetDecoder,
    "Qwen3_5MoeForCausalLM": DeltaNetDecoder,
    "Qwen3_5MoeForConditionalGeneration": DeltaNetDecoder,
}
COMPILED_BY_VLLM = {"Ernie4_5ForCausalLM"}  # the class; of others, a module in it


def __getattr__(name: str) -> type[EarlyExit]:
    """Our class of that name, such as ``AdaInferLlamaForCausalLM``, from now on in this module."""
    stock = name.removeprefix("AdaInfer")
    if stock == name or stock not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = {"decoder": DECODERS.get(stock, Decoder), "__module__": __name__}
    found = new_class(
        name, (EarlyExit, resolve_name(STOCK[stock])), exec_body=lambda b: b.update(own)
    )
    if stock in COMPILED_BY_VLLM:  # we compile its segments instead
        found = ignore_torch_compile(found)
    return globals().setdefault(name, found)
