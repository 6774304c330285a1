"""Llama, and the families that vLLM builds like it, with exit points."""

from __future__ import annotations

from vllm.compilation.decorators import ignore_torch_compile
from vllm.model_executor.models.ernie45 import Ernie4_5ForCausalLM
from vllm.model_executor.models.glm4 import Glm4ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM

from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.segments.decoder import Decoder


@ignore_torch_compile  # vLLM compiles this class; we compile its segments instead
class AdaInferErnie4_5ForCausalLM(EarlyExit, Ernie4_5ForCausalLM):
    """Ernie 4.5, dense."""

    decoder = Decoder


class AdaInferGlm4ForCausalLM(EarlyExit, Glm4ForCausalLM):
    """GLM-4, dense."""

    decoder = Decoder


class AdaInferLlamaForCausalLM(EarlyExit, LlamaForCausalLM):
    """Llama 2 and 3, and other models of their architecture."""

    decoder = Decoder


class AdaInferMistralForCausalLM(EarlyExit, MistralForCausalLM):
    """Mistral and Ministral."""

    decoder = Decoder


class AdaInferPhi3ForCausalLM(EarlyExit, Phi3ForCausalLM):
    """Phi-3 and Phi-4."""

    decoder = Decoder
