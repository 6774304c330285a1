"""Llama, and what vLLM builds of it: its classes with exit points."""

from __future__ import annotations

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM

from vllm_adainfer.models.decoder import Decoder
from vllm_adainfer.models.early_exit import EarlyExit


class AdaInferLlamaForCausalLM(EarlyExit, LlamaForCausalLM):
    """Llama 2 and 3, and all that uses their architecture."""

    decoder = Decoder


class AdaInferMistralForCausalLM(EarlyExit, MistralForCausalLM):
    """Mistral and Ministral."""

    decoder = Decoder


class AdaInferPhi3ForCausalLM(EarlyExit, Phi3ForCausalLM):
    """Phi-3 and Phi-4."""

    decoder = Decoder
