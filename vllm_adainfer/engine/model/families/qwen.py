"""Qwen 2, 2.5 and 3 with exit points."""

from __future__ import annotations

from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.segments.decoder import Decoder


class AdaInferQwen2ForCausalLM(EarlyExit, Qwen2ForCausalLM):
    """Qwen 2 and 2.5."""

    decoder = Decoder


class AdaInferQwen3ForCausalLM(EarlyExit, Qwen3ForCausalLM):
    """Qwen 3, dense."""

    decoder = Decoder
