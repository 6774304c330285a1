"""Our classes, by the names under which vLLM loads them. Imports no other part of ours."""

from __future__ import annotations

from typing import Any

CPU_WORKER = "vllm_adainfer.engine.worker.cpu_worker.AdaInferCPUWorker"
GPU_WORKER = "vllm_adainfer.engine.worker.gpu_worker.AdaInferGPUWorker"
DRAFTING_CPU_WORKER = "vllm_adainfer.engine.worker.stock_workers.DraftingCPUWorker"
DRAFTING_GPU_WORKER = "vllm_adainfer.engine.worker.stock_workers.DraftingGPUWorker"
SCHEDULER = "vllm_adainfer.engine.scheduler.scheduler.build_scheduler"
# vLLM's classes that have exit points.
STOCK_CLASSES = (
    "vllm.model_executor.models.ernie45:Ernie4_5ForCausalLM",
    "vllm.model_executor.models.gemma:GemmaForCausalLM",
    "vllm.model_executor.models.gemma2:Gemma2ForCausalLM",
    "vllm.model_executor.models.gemma3:Gemma3ForCausalLM",
    "vllm.model_executor.models.gemma4:Gemma4ForCausalLM",
    "vllm.model_executor.models.gemma4_mm:Gemma4ForConditionalGeneration",
    "vllm.model_executor.models.glm4:Glm4ForCausalLM",
    "vllm.model_executor.models.glm4_moe:Glm4MoeForCausalLM",
    "vllm.model_executor.models.gpt_oss:GptOssForCausalLM",
    "vllm.model_executor.models.granite:GraniteForCausalLM",
    "vllm.model_executor.models.llama:LlamaForCausalLM",
    "vllm.model_executor.models.mistral:MistralForCausalLM",
    "vllm.model_executor.models.mixtral:MixtralForCausalLM",
    "vllm.model_executor.models.olmoe:OlmoeForCausalLM",
    "vllm.model_executor.models.opt:OPTForCausalLM",
    "vllm.model_executor.models.phi3:Phi3ForCausalLM",
    "vllm.model_executor.models.qwen2:Qwen2ForCausalLM",
    "vllm.model_executor.models.qwen3:Qwen3ForCausalLM",
    "vllm.model_executor.models.qwen3_5:Qwen3_5ForCausalLM",
    "vllm.model_executor.models.qwen3_5:Qwen3_5ForConditionalGeneration",
    "vllm.model_executor.models.qwen3_5:Qwen3_5MoeForCausalLM",
    "vllm.model_executor.models.qwen3_5:Qwen3_5MoeForConditionalGeneration",
    "vllm.model_executor.models.qwen3_moe:Qwen3MoeForCausalLM",
    "vllm.model_executor.models.qwen3_next:Qwen3NextForCausalLM",
)
STOCK = {name.rpartition(":")[2]: name for name in STOCK_CLASSES}
# Stock architecture -> our model class, which vLLM imports only for an engine with our switch.
MODELS = {name: f"vllm_adainfer.engine.model.families:AdaInfer{name}" for name in STOCK}
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


def worker_class(has_exits: bool = True) -> str:
    """Our worker class for vLLM's platform; without exits, for vLLM's own models."""
    from vllm.platforms import current_platform

    on_cpu, on_gpu = DRAFTING_CPU_WORKER, DRAFTING_GPU_WORKER
    if has_exits:
        on_cpu, on_gpu = CPU_WORKER, GPU_WORKER
    return on_cpu if current_platform.is_cpu() else on_gpu
