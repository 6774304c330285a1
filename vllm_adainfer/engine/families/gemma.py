"""Gemma 1, 2 and 3 (text) with exit points."""

from __future__ import annotations

from typing import Any

from typing_extensions import override
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM

from vllm_adainfer.engine.decoder import Decoder
from vllm_adainfer.engine.early_exit import EarlyExit


class Gemma2Decoder(Decoder):
    """As Llama, but the embedding is also the LM head."""

    @staticmethod
    @override
    def head(model: Any) -> Any:
        return model.model.embed_tokens


class AdaInferGemmaForCausalLM(EarlyExit, GemmaForCausalLM):
    """Gemma 1."""

    decoder = Decoder


class AdaInferGemma2ForCausalLM(EarlyExit, Gemma2ForCausalLM):
    """Gemma 2."""

    decoder = Gemma2Decoder


class AdaInferGemma3ForCausalLM(EarlyExit, Gemma3ForCausalLM):
    """Gemma 3, text only."""

    decoder = Decoder
