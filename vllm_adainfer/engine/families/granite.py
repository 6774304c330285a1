"""Granite 3 (dense) with exit points."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.granite import GraniteForCausalLM

from vllm_adainfer.engine.decoder import Decoder
from vllm_adainfer.engine.early_exit import EarlyExit


class GraniteDecoder(Decoder):
    """Llama's, with a multiplied embedding and a stream in one part."""

    @staticmethod
    def embed(body: Any, ids: Tensor, positions: Tensor) -> Tensor:
        """See `Decoder.embed`."""
        return Decoder.embed(body, ids, positions) * float(body.config.embedding_multiplier)

    @staticmethod
    def run_layer(
        layer: nn.Module, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, None]:
        """See `Decoder.run_layer`."""
        return layer(positions, hidden), None

    @staticmethod
    def finish(body: Any, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """See `Decoder.finish`."""
        normed: Tensor = body.norm(hidden)
        return normed


class AdaInferGraniteForCausalLM(EarlyExit, GraniteForCausalLM):
    """Granite 3, dense."""

    decoder = GraniteDecoder
