"""Granite 3 (dense) with exit points."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override
from vllm.model_executor.models.granite import GraniteForCausalLM

from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.segments.decoder import Decoder, OnePartDecoder


class GraniteDecoder(OnePartDecoder):
    """With a scaled embedding."""

    @staticmethod
    @override
    def embed(body: Any, ids: Tensor, positions: Tensor) -> Tensor:
        return Decoder.embed(body, ids, positions) * float(body.config.embedding_multiplier)


class AdaInferGraniteForCausalLM(EarlyExit, GraniteForCausalLM):
    """Granite 3, dense."""

    decoder = GraniteDecoder
