"""The architectures with exit points, and our model class for each. Imports no other part."""

from __future__ import annotations

from typing import Any

# Stock architecture -> our model class, which vLLM loads only for an engine that asks for it.
MODELS = {
    "Ernie4_5ForCausalLM": "vllm_adainfer.engine.model.families.llama:AdaInferErnie4_5ForCausalLM",
    "GemmaForCausalLM": "vllm_adainfer.engine.model.families.gemma:AdaInferGemmaForCausalLM",
    "Gemma2ForCausalLM": "vllm_adainfer.engine.model.families.gemma:AdaInferGemma2ForCausalLM",
    "Gemma3ForCausalLM": "vllm_adainfer.engine.model.families.gemma:AdaInferGemma3ForCausalLM",
    "Gemma4ForCausalLM": "vllm_adainfer.engine.model.families.gemma:AdaInferGemma4ForCausalLM",
    "Gemma4ForConditionalGeneration": (
        "vllm_adainfer.engine.model.families.gemma:AdaInferGemma4ForConditionalGeneration"
    ),
    "Glm4ForCausalLM": "vllm_adainfer.engine.model.families.llama:AdaInferGlm4ForCausalLM",
    "Glm4MoeForCausalLM": "vllm_adainfer.engine.model.families.mixtures:AdaInferGlm4MoeForCausalLM",
    "GptOssForCausalLM": "vllm_adainfer.engine.model.families.mixtures:AdaInferGptOssForCausalLM",
    "GraniteForCausalLM": "vllm_adainfer.engine.model.families.granite:AdaInferGraniteForCausalLM",
    "LlamaForCausalLM": "vllm_adainfer.engine.model.families.llama:AdaInferLlamaForCausalLM",
    "MistralForCausalLM": "vllm_adainfer.engine.model.families.llama:AdaInferMistralForCausalLM",
    "MixtralForCausalLM": "vllm_adainfer.engine.model.families.mixtures:AdaInferMixtralForCausalLM",
    "OlmoeForCausalLM": "vllm_adainfer.engine.model.families.mixtures:AdaInferOlmoeForCausalLM",
    "OPTForCausalLM": "vllm_adainfer.engine.model.families.opt:AdaInferOPTForCausalLM",
    "Phi3ForCausalLM": "vllm_adainfer.engine.model.families.llama:AdaInferPhi3ForCausalLM",
    "Qwen2ForCausalLM": "vllm_adainfer.engine.model.families.qwen:AdaInferQwen2ForCausalLM",
    "Qwen3ForCausalLM": "vllm_adainfer.engine.model.families.qwen:AdaInferQwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "vllm_adainfer.engine.model.families.mixtures:AdaInferQwen3MoeForCausalLM",
    **{
        name: f"vllm_adainfer.engine.model.families.delta_net:AdaInfer{name}"
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
    """How many layers write keys and values, if later ones read those of others.

    By the Hugging Face config of the language model.
    """
    sharing = getattr(text_config, "num_kv_shared_layers", 0)
    return text_config.num_hidden_layers - sharing if sharing else None
