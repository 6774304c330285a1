"""Granite 3 (dense) with exit points."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override
from vllm.model_executor.models.granite import GraniteForCausalLM

from vllm_adainfer.engine.decoder import Decoder
from vllm_adainfer.engine.early_exit import EarlyExit


class GraniteDecoder(Decoder):
    """As Llama, but with a scaled embedding and a residual stream in one part."""

    @staticmethod
    @override
    def embed(body: Any, ids: Tensor, positions: Tensor) -> Tensor:
        return Decoder.embed(body, ids, positions) * float(body.config.embedding_multiplier)

    @staticmethod
    @override
    def run_layer(
        layer: nn.Module,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
        own: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        return layer(positions, hidden), None

    @staticmethod
    @override
    def finish(body: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
        normed: Tensor = body.norm(hidden)
        return normed


class AdaInferGraniteForCausalLM(EarlyExit, GraniteForCausalLM):
    """Granite 3, dense."""

    decoder = GraniteDecoder
