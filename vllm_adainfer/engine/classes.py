"""Our classes, by the names under which vLLM loads them. Imports no other part of ours."""

from __future__ import annotations

from typing import Any

CPU_WORKER = "vllm_adainfer.engine.worker.cpu_worker.AdaInferCPUWorker"
GPU_WORKER = "vllm_adainfer.engine.worker.gpu_worker.AdaInferGPUWorker"
SCHEDULER = "vllm_adainfer.engine.scheduler.scheduler.build_scheduler"
FAMILIES = "vllm_adainfer.engine.model.families"
# Stock architecture -> our model class, which vLLM imports only for an engine with our switch.
MODELS = {
    "Ernie4_5ForCausalLM": f"{FAMILIES}.llama:AdaInferErnie4_5ForCausalLM",
    "GemmaForCausalLM": f"{FAMILIES}.gemma:AdaInferGemmaForCausalLM",
    "Gemma2ForCausalLM": f"{FAMILIES}.gemma:AdaInferGemma2ForCausalLM",
    "Gemma3ForCausalLM": f"{FAMILIES}.gemma:AdaInferGemma3ForCausalLM",
    "Gemma4ForCausalLM": f"{FAMILIES}.gemma:AdaInferGemma4ForCausalLM",
    "Gemma4ForConditionalGeneration": f"{FAMILIES}.gemma:AdaInferGemma4ForConditionalGeneration",
    "Glm4ForCausalLM": f"{FAMILIES}.llama:AdaInferGlm4ForCausalLM",
    "Glm4MoeForCausalLM": f"{FAMILIES}.mixtures:AdaInferGlm4MoeForCausalLM",
    "GptOssForCausalLM": f"{FAMILIES}.mixtures:AdaInferGptOssForCausalLM",
    "GraniteForCausalLM": f"{FAMILIES}.granite:AdaInferGraniteForCausalLM",
    "LlamaForCausalLM": f"{FAMILIES}.llama:AdaInferLlamaForCausalLM",
    "MistralForCausalLM": f"{FAMILIES}.llama:AdaInferMistralForCausalLM",
    "MixtralForCausalLM": f"{FAMILIES}.mixtures:AdaInferMixtralForCausalLM",
    "OlmoeForCausalLM": f"{FAMILIES}.mixtures:AdaInferOlmoeForCausalLM",
    "OPTForCausalLM": f"{FAMILIES}.opt:AdaInferOPTForCausalLM",
    "Phi3ForCausalLM": f"{FAMILIES}.llama:AdaInferPhi3ForCausalLM",
    "Qwen2ForCausalLM": f"{FAMILIES}.qwen:AdaInferQwen2ForCausalLM",
    "Qwen3ForCausalLM": f"{FAMILIES}.qwen:AdaInferQwen3ForCausalLM",
    "Qwen3MoeForCausalLM": f"{FAMILIES}.mixtures:AdaInferQwen3MoeForCausalLM",
    **{
        name: f"{FAMILIES}.delta_net:AdaInfer{name}"
        for name in (
            "Qwen3NextForCausalLM",
            "Qwen3_5ForCausalLM",
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForCausalLM",
            "Qwen3_5MoeForConditionalGeneration",
        )
    },
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


def own_kv_layers(text_config: Any) -> int | None:
    """How many layers write keys and values; None if every layer does.

    `text_config` is the Hugging Face config of the language model. Later layers reuse the keys and
    values of earlier ones.
    """
    sharing = getattr(text_config, "num_kv_shared_layers", 0)
    return text_config.num_hidden_layers - sharing if sharing else None


def worker_class() -> str:
    """Our worker class for vLLM's platform."""
    from vllm.platforms import current_platform

    return CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
