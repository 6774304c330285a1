"""Entry point of the ``vllm.general_plugins`` group: what vLLM learns from us, in one table."""

from __future__ import annotations

# Stock architecture -> our model class, which vLLM loads only for an engine that asks for it.
MODELS = {
    "Ernie4_5ForCausalLM": "vllm_adainfer.models.llama:AdaInferErnie4_5ForCausalLM",
    "GemmaForCausalLM": "vllm_adainfer.models.gemma:AdaInferGemmaForCausalLM",
    "Gemma2ForCausalLM": "vllm_adainfer.models.gemma:AdaInferGemma2ForCausalLM",
    "Gemma3ForCausalLM": "vllm_adainfer.models.gemma:AdaInferGemma3ForCausalLM",
    "Glm4ForCausalLM": "vllm_adainfer.models.llama:AdaInferGlm4ForCausalLM",
    "GraniteForCausalLM": "vllm_adainfer.models.granite:AdaInferGraniteForCausalLM",
    "LlamaForCausalLM": "vllm_adainfer.models.llama:AdaInferLlamaForCausalLM",
    "MistralForCausalLM": "vllm_adainfer.models.llama:AdaInferMistralForCausalLM",
    "OPTForCausalLM": "vllm_adainfer.models.opt:AdaInferOPTForCausalLM",
    "Phi3ForCausalLM": "vllm_adainfer.models.llama:AdaInferPhi3ForCausalLM",
    "Qwen2ForCausalLM": "vllm_adainfer.models.qwen:AdaInferQwen2ForCausalLM",
    "Qwen3ForCausalLM": "vllm_adainfer.models.qwen:AdaInferQwen3ForCausalLM",
}
# Other names under which vLLM 0.32 builds the same classes.
SAME_AS = {
    "IQuestCoderForCausalLM": "LlamaForCausalLM",
    "InternLM3ForCausalLM": "LlamaForCausalLM",
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "TeleChat3ForCausalLM": "LlamaForCausalLM",
    "Ministral3ForCausalLM": "MistralForCausalLM",
}
MODELS |= {name: MODELS[same] for name, same in SAME_AS.items()}


def register() -> None:
    """Tell vLLM about our classes; runs in every process, any number of times.

    Stock registry entries stay: an engine whose ``additional_config`` has no ``adainfer`` key
    builds vLLM's own model, worker and scheduler.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_adainfer.engine import configure_hook, is_configure_hook

    for ours in set(MODELS.values()):
        ModelRegistry.register_model(ours.rpartition(":")[2], ours)
    # The documented hook is asked by architecture. Every architecture gets one, so that the
    # switch is refused, not ignored, on a model without exit points.
    for architecture in ModelRegistry.get_supported_archs():
        hook = MODELS_CONFIG_MAP.get(architecture)
        if not is_configure_hook(hook):
            model_class = MODELS.get(architecture, "").rpartition(":")[2]
            MODELS_CONFIG_MAP[architecture] = configure_hook(hook, model_class)
