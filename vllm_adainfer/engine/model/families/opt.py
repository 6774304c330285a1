"""OPT with exit points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override
from vllm.model_executor.models.opt import OPTForCausalLM

from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.segments.decoder import Decoder, KVProjection, Layer


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


class AdaInferOPTForCausalLM(EarlyExit, OPTForCausalLM):
    """OPT, of any size."""

    decoder = OPTDecoder
