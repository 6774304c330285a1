"""Our classes, by the names under which vLLM loads them. Imports no other part of ours."""

from __future__ import annotations

from typing import Any

CPU_WORKER = "vllm_adainfer.engine.worker.cpu_worker.AdaInferCPUWorker"
GPU_WORKER = "vllm_adainfer.engine.worker.gpu_worker.AdaInferGPUWorker"
SCHEDULER = "vllm_adainfer.engine.scheduler.scheduler.build_scheduler"
# The architectures that have exit points, by the module of their classes.
ARCHITECTURES = {
    "gemma": (
        *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM"),
        "Gemma4ForConditionalGeneration",
    ),
    "granite": ("GraniteForCausalLM",),
    "llama": (
        *("Ernie4_5ForCausalLM", "Glm4ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
        "Phi3ForCausalLM",
    ),
    "mixtures": (
        *("Glm4MoeForCausalLM", "GptOssForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM"),
        "Qwen3MoeForCausalLM",
    ),
    "opt": ("OPTForCausalLM",),
    "qwen": ("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    "delta_net": (
        *("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        *("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    ),
}
# Stock architecture -> our model class, which vLLM imports only for an engine with our switch.
MODELS = {
    name: f"vllm_adainfer.engine.model.families.{module}:AdaInfer{name}"
    for module, names in ARCHITECTURES.items()
    for name in names
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


def model_class_of(architecture: str) -> str:
    """Name of our model class for a stock architecture; empty if it has no exit points.

    vLLM 0.32 makes a classifier of the causal model of the same name.
    """
    causal = architecture.replace("ForSequenceClassification", "ForCausalLM")
    return MODELS.get(causal, "").rpartition(":")[2]


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
